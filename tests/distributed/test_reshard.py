"""One run that goes on again and again on another number of ranks or another mesh: what was saved comes back bit for bit,
and the run ends as one that stayed where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.weights import load_checkpoint, materialize, resolve_load, save_checkpoint
from mm_core.weights.tensors import named_parameters
from tests.distributed.against_one import distance, whole
from tests.distributed.harness import run_ranks
from tests.distributed.models import BATCH, MOE, WAN, TinyModel, optimizer_of

pytestmark = pytest.mark.timeout(180)

FSDP: dict[str, Any] = {}
HSDP: dict[str, Any] = {"sharding_size": 2}
EP: dict[str, Any] = {"expert_parallel_size": 2}
EP_ALL: dict[str, Any] = {"expert_parallel_size": 4}
EP_HSDP: dict[str, Any] = {"expert_parallel_size": 2, "sharding_size": 2}


def part_of_a_run(
    model: TinyModel, run: Path, first: int, last: int, fsdp2: dict[str, Any]
) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """Steps `first` to `last`, exclusive, then a checkpoint.

    Returns:
        Losses; weights and moments as they were loaded, and at the end.
    """
    composite = model.composite()
    composite.fully_shard(None, Fsdp2Config(**fsdp2))
    predictor = composite.predictor
    materialize(predictor, "cpu", 11 if first else 0)
    optimizer = optimizer_of(predictor)
    if first:
        state = load_checkpoint(resolve_load(run), {"predictor": predictor}, optimizer)
        assert state["step"] == first
    loaded = everything(predictor, optimizer)
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, last):
        loss, weight = model.loss(predictor, step, rank, world)
        total = torch.stack([loss.detach(), weight])
        dist.all_reduce(total)
        (loss * world / total[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total[0] / total[1]).item())
    if losses:
        state = {"step": last, "consumed_samples": 8 * last, "seed": 0}
        save_checkpoint(run, last, {"predictor": predictor}, optimizer, state, with_rng=False)
    return losses, loaded, everything(predictor, optimizer)


def everything(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and AdamW's moments, whole."""
    found = {}
    for name, parameter in named_parameters(module):
        found[name] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key} of {name}"] = whole(value)
    return found


@pytest.mark.parametrize(
    ("model", "meshes"),
    [
        pytest.param(MOE, [(2, FSDP), (1, FSDP), (2, EP)], id="2-1-ep"),
        pytest.param(
            MOE,
            [(4, FSDP), (2, FSDP), (1, FSDP), (2, EP), (4, FSDP)],
            id="4-2-1-ep-4",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            MOE,
            [(1, FSDP), (4, EP_ALL), (4, EP_HSDP), (2, EP), (4, HSDP), (3, FSDP), (4, EP_ALL), (2, FSDP)],
            id="meshes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            WAN,
            [(4, FSDP), (2, FSDP), (1, FSDP), (2, FSDP), (4, HSDP)],
            id="wan",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_moves_ends_as_one_that_stays(
    model: TinyModel, meshes: list[tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    world, fsdp2 = meshes[0]
    steps = sum(BATCH % ranks == 0 for ranks, _ in meshes)  # other numbers of ranks only load
    straight, _, at_end = run_ranks(part_of_a_run, world, model, tmp_path / "whole", 0, steps, fsdp2)[0]
    losses: list[float] = []
    before: dict[str, Any] = {}
    for world, fsdp2 in meshes:
        last = len(losses) + (BATCH % world == 0)
        arguments = (model, tmp_path / "run", len(losses), last, fsdp2)
        more, loaded, after = run_ranks(part_of_a_run, world, *arguments)[0]
        if losses:
            assert loaded.keys() == before.keys()
            assert all(np.array_equal(loaded[name], before[name]) for name in before), (world, fsdp2)
        before = after
        losses += more
    np.testing.assert_allclose(losses, straight, rtol=1e-6)
    for kind in ("", "exp_avg of ", "exp_avg_sq of ", "step of "):
        assert distance(of_kind(after, kind), of_kind(at_end, kind)) < 1e-6


def of_kind(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """Of `everything`: the moments that are meant, or "" for the weights."""
    return {
        name: value
        for name, value in values.items()
        if (name.startswith(kind) if kind else " of " not in name)
    }
