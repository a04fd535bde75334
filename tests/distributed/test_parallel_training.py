"""A run goes on with another way to share the model: FSDP2 alone, then sequences, then stages. Real jobs in ranks that
are forked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from mm_core.weights.tensors import state_tensors
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


def test_a_checkpoint_goes_on_as_fsdp_then_sequences_then_stages(tmp_path):
    def in_turn() -> tuple[list[float], dict[str, Any]]:
        run = tmp_path / "turns"
        turns = [
            run_to(1, run),
            run_to(2, run, "--load", run, *SEQUENCES),
            run_to(3, run, "--load", run, *STAGES),
            run_to(4, run, "--load", run, *STAGES, *SEQUENCES),
            run_to(5, run, "--load", run),
        ]
        return [loss for losses, _ in turns for loss in losses], turns[-1][1]

    losses, weights = run_ranks(in_turn, 4, timeout=120)[0]
    expected, final = run_ranks(run_to, 1, 5, tmp_path / "alone", timeout=120)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert distance(weights, final) <= 1e-5
