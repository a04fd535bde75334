"""The loss of language models over ranks: each weighting in each mode, packed rows, and heads that ranks share."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.config.transformers_model import LossConfig
from mm_core.models.transformers_model import TransformersModel
from mm_core.sharding.plan import bare_name
from mm_core.training.tasks.language import LanguageTask
from mm_core.weights import materialize
from tests import tiny_vlm
from tests.distributed import vision_language
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import _whole as whole
from tests.packing import packed

pytestmark = pytest.mark.timeout(150)

TYPES = ("default", "per_sample_loss", "per_token_loss", "token_loss", "square_loss")
MODES = ("default", "chunk", "dynamic_chunk")
SAMPLES = [
    tiny_vlm.sample(kind, 3 + 4 * i, i) for i, kind in enumerate(("image", "text", "video", "two_images"))
]
WATCHED = (
    "lm_head.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.visual.patch_embed.proj.weight",
)
LENGTH = 44
Found = dict[str, Any]


def rows(part: slice, pack: bool) -> dict[str, torch.Tensor]:
    samples = SAMPLES[part]
    if not pack:
        return tiny_vlm.collate(samples, LENGTH)
    # Rows of one length, whatever is in them: ranks that share sequences have parts of one size.
    return packed([samples[:1], samples[1:]] if len(samples) > 2 else [samples, []], 100)


def learn(
    losses: list[tuple[str, str]], sizes: ParallelSizes, micro: int, pack: bool, moe: bool, coef: float
) -> list[Found]:
    """Loss and gradients of the global batch for each weighting and mode, as the loop takes them."""
    with torch.device("meta"):
        model = TransformersModel(
            vision_language.make(moe), sharding_policy=vision_language.policy(moe), router_aux_loss_coef=coef
        )
    model.fully_shard(None, Fsdp2Config(), sizes)
    materialize(model.model, "cpu", 0)
    mesh = model.parallel_mesh
    head = model.model.lm_head
    forward = vars(head).get("forward")
    found = []
    for loss_type, mode in losses:
        chunk = None if mode == "default" else 5
        model.loss = LossConfig.model_validate(
            {"loss_type": loss_type, "compute_mode": mode, "chunk_size": chunk}
        )
        task = LanguageTask(model, seed=0, device=torch.device("cpu"))
        model.zero_grad()
        own = len(SAMPLES) // mesh.dp_size
        first = mesh.dp_rank * own
        batches = [rows(slice(at, at + micro), pack) for at in range(first, first + own, micro)]
        totals = torch.zeros(2, dtype=torch.float64)
        for inputs in task.prepare(batches):
            sums, weights, _ = task.loss(task.forward(model, inputs), inputs)
            (sums.sum() * mesh.fsdp.size()).backward()  # FSDP2 takes the mean of the ranks' gradients
            totals += torch.stack([sums.detach().sum(), weights.sum()])
        dist.all_reduce(totals)
        totals /= sizes.tp  # these ranks have the same
        weight = totals[1].item()
        named = {bare_name(name): p for name, p in model.model.named_parameters()}
        gradients = {name: whole(named[name].grad).numpy().copy() / weight for name in WATCHED}
        vars(head).pop("forward", None)  # as the next mode is to find it
        if forward is not None:
            vars(head)["forward"] = forward
        found.append({"loss": totals[0].item() / weight, "weight": weight, **gradients})
    return found


def same(found: list[Found], wanted: list[Found]) -> None:
    for one, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            largest = np.abs(np.asarray(value)).max()
            np.testing.assert_allclose(one[name], value, rtol=2e-5, atol=2e-6 * largest, err_msg=name)


ONE = ParallelSizes()
WAYS = {
    "two_ranks": (2, ONE, 2, False),
    "accumulated": (1, ONE, 2, False),
    "context": (2, ParallelSizes(cp=2), 4, False),
    "packed_two_ranks": (2, ONE, 2, True),
    "packed_ring": (2, ParallelSizes(cp=2, cp_algo="ring"), 4, True),
    "packed_context_accumulated": (2, ParallelSizes(cp=2), 2, True),
    "tensor": (2, ParallelSizes(tp=2), 4, False),
}
EVERY = [(loss_type, mode) for loss_type in TYPES for mode in MODES]


@functools.cache
def _alone(moe: bool, coef: float) -> dict[str, Found]:
    """All samples in one micro batch of one rank, padded, with all logits."""
    plain = [(loss_type, "default") for loss_type in TYPES]
    return dict(zip(TYPES, run_ranks(learn, 1, plain, ONE, 4, False, moe, coef)[0], strict=True))


def reference(losses: list[tuple[str, str]], moe: bool = False, coef: float = 0.0) -> list[Found]:
    return [_alone(moe, coef)[loss_type] for loss_type, _ in losses]


SLOW = ("packed_two_ranks", "packed_ring", "tensor")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] if way in SLOW else []) for way in WAYS]
)
def test_every_weighting_in_every_mode_is_that_of_one_process(way: str) -> None:
    ranks, sizes, micro, pack = WAYS[way]
    losses = (
        EVERY if not pack and sizes.tp == 1 else [(t, m) for t, m in EVERY if t in ("default", "square_loss")]
    )
    for found in run_ranks(learn, ranks, losses, sizes, micro, pack, False, 0.0, timeout=140):
        same(found, reference(losses))


@pytest.mark.slow
def test_experts_are_balanced_document_by_document() -> None:
    losses = [("default", "default"), ("square_loss", "chunk")]
    wanted = reference(losses, True, 0.1)
    for ranks, sizes, micro, pack in (WAYS["packed_two_ranks"], WAYS["packed_ring"]):
        for found in run_ranks(learn, ranks, losses, sizes, micro, pack, True, 0.1, timeout=140):
            same(found, wanted)
