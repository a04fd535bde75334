"""A run goes on with another way to share the model: FSDP2 alone, then sequences, then stages. Real jobs in ranks that
are forked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mm_core.config import parse_train_flags
from mm_core.training.optimizer import build_optimizer
from mm_core.weights.tensors import state_tensors
from mm_registry.errors import UserError
from tests.distributed.against_one import distance, whole
from tests.distributed.harness import run_ranks
from tests.distributed.test_resume import trainer_of

pytestmark = pytest.mark.timeout(150)

BATCH = ("--global-batch-size", "4", "--ema-decay", "0.9")
SEQUENCES = ("--context-parallel-size", "2")
STAGES = ("--pipeline-model-parallel-size", "2")


def weights_of(trainer: Any) -> dict[str, Any]:
    """The whole tensors of all stages and their averages, on every rank."""
    own = {name: whole(tensor) for name, tensor in state_tensors(trainer.model.predictor).items()}
    own |= {f"ema.{name}": whole(tensor) for name, tensor in trainer.ema.tensors("predictor").items()}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def run_to(step: int, run: Path, *more: str | Path) -> tuple[list[float], dict[str, Any]]:
    """Train the tiny job to a step, as `mm train` does between launch and end: new losses, and the weights."""
    trainer = trainer_of(run, *BATCH, "--train-iters", str(step), *more)
    first = trainer.step
    trainer.train(lambda: False)
    weights = weights_of(trainer)  # rank 0 has written its metrics when all are here
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines][first - step :], weights


TURNS = ((), SEQUENCES, STAGES, (*STAGES, *SEQUENCES), ())


@pytest.mark.parametrize(
    ("ranks", "turns"),
    [(2, (SEQUENCES, STAGES)), pytest.param(4, TURNS, marks=pytest.mark.slow)],
    ids=["sequences then stages", "all in turn"],
)
def test_a_checkpoint_goes_on_with_another_way_to_share_the_model(ranks, turns, tmp_path):
    def in_turn() -> tuple[list[float], dict[str, Any]]:
        run = tmp_path / "turns"
        done = [
            run_to(step, run, *(("--load", run) if step > 1 else ()), *flags)
            for step, flags in enumerate(turns, 1)
        ]
        return [loss for losses, _ in done for loss in losses], done[-1][1]

    losses, weights = run_ranks(in_turn, ranks, timeout=120)[0]
    expected, final = run_ranks(run_to, 1, len(turns), tmp_path / "alone", timeout=120)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert distance(weights, final) <= 1e-5


def test_a_stage_whose_blocks_are_frozen_has_nothing_to_optimize():
    def step() -> list[float]:
        weight = torch.nn.Parameter(torch.ones(2), requires_grad=dist.get_rank() == 1)
        flags = parse_train_flags(["--lr", "0.5", "--train-iters", "1"])
        optimizer = build_optimizer([weight], flags)
        weight.grad = torch.ones(2) if weight.requires_grad else None
        optimizer.step()
        with pytest.raises(UserError, match="every parameter of the model is frozen"):
            build_optimizer([weight.requires_grad_(False)], flags)
        return weight.tolist()

    frozen, moved = run_ranks(step, 2)
    assert frozen == [1, 1]
    assert max(moved) < 1
