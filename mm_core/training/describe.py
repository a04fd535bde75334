"""What a training run says of itself before its first step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch.distributed as dist

from mm_core.observe.console import human_count, show
from mm_core.sharding.parameters import parameters_text, part_parameters
from mm_core.sharding.table import plan_texts

if TYPE_CHECKING:
    from mm_core.training.trainer import Trainer

log = logging.getLogger(__name__)


def describe(trainer: Trainer) -> None:
    """Show the sharding plans and the parameters of the parts on rank 0, and log what is trained, on what, and how its
    gradients are exchanged.
    """
    mesh, flags, model = trainer.mesh, trainer.flags, trainer.model
    if trainer.rank == 0:
        show(plan_texts(model.sharding_plans, model.device_mesh.size(-1), model.device_mesh.size()))
        show(parameters_text(part_parameters(model, model.sharding_plans)))
    trained = sum(p.numel() for p in trainer.parameters)
    log.info(
        "training %s parameters%s on %d × %s (%s); global batch %d = %d %s × micro batch %d × %d accumulated",
        human_count(trained), " of this stage" if mesh.pp is not None else "", trainer.world_size, trainer.device.type,
        dist.get_backend(), flags.global_batch_size, mesh.dp_size,
        "ranks" if mesh.dp_size == trainer.world_size else "groups of ranks", flags.micro_batch_size,
        trainer.accumulation,
    )  # fmt: skip
    if trainer.updates.parts:
        idle = "waits in host memory" if trainer.updates.offloads else "stays where it is"
        log.info("two experts, each with the samples of its noise levels; the idle one %s", idle)
    if str(mesh.sizes):
        log.info("one model is shared as %s", mesh.sizes)
    if mesh.pp is not None:
        log.info("%s", trainer.passes)
    log.info(
        "%s; %s",
        trainer.exchange,
        "clipped without waiting for the device" if trainer.clip_grad_async else "clipped at once",
    )
