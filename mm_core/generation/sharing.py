"""Several ranks at once: videos are dealt out to them, and with context parallelism several share each video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.models.factory import sharding_policy
from mm_core.models.sora import EXPERTS
from mm_core.sharding.build import build_plan
from mm_core.sharding.context import share_attention, share_sequences
from mm_core.sharding.mesh import ParallelMesh, build_parallel_mesh
from mm_registry.errors import UserError

if TYPE_CHECKING:
    from mm_core.config.component import ComponentConfig
    from mm_core.config.parallel import ParallelSizes
    from mm_core.models.sora import SoRAModel


@dataclass(frozen=True)
class Sharing:
    """What this rank does of a job.

    Attributes:
        place, groups: this rank belongs to the `place`-th of so many groups, each of which makes its own videos.
        writes: whether it writes the videos of its group.
        mesh: of the ranks, if several share a video.
    """

    place: int = 0
    groups: int = 1
    writes: bool = True
    mesh: ParallelMesh | None = None


def share_work(sizes: ParallelSizes) -> Sharing:
    """Return what this rank does. Every rank of the process group calls this; without one, this rank does everything.

    Raises:
        UserError: the ranks cannot be grouped so.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if sizes.cp > 1:
            raise UserError(
                f"--context-parallel-size {sizes.cp}: only one rank was started; give --nproc-per-node {sizes.cp}, or 1"
            )
        return Sharing()
    mesh = build_parallel_mesh(Fsdp2Config(), sizes)
    first = mesh.cp is None or mesh.cp.get_local_rank() == 0
    return Sharing(mesh.dp_rank, mesh.dp_size, first, mesh if sizes.cp > 1 else None)


def patient_group() -> dist.ProcessGroup | None:
    """A group of all ranks on the host whose members wait for each other for a month: one rank may make a video for hours
    while another has none left. Every rank calls this; None without other ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def share_videos(model: SoRAModel, components: Mapping[str, ComponentConfig], mesh: ParallelMesh) -> None:
    """Let the ranks of a group share the sequences of the experts, in place; each holds all weights.

    Raises:
        UserError: an expert's sharding policy does not say how, or its heads cannot be dealt out.
    """
    for name in EXPERTS:
        root: Any = getattr(model, name)
        if root is None:
            continue
        policy = sharding_policy(components[name])
        if policy is None:
            raise UserError(
                f"--context-parallel-size: {components[name].label} has no sharding policy that says where its sequences "
                "are split; set it to 1"
            )
        plan = build_plan(root, policy, Fsdp2Config(), name)
        modules = dict(root.named_modules())
        context = share_attention(root, modules, plan, mesh)
        if context is not None:
            share_sequences(modules, modules, context)
