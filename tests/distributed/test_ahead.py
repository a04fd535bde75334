"""A job that encodes ahead trains on the very numbers of one that does not."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from mm_core.accelerator import Accelerator
from mm_core.config import load_training_job, parse_train_flags
from mm_core.data import build_dataset
from mm_core.training.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.distributed.test_participation import whole
from tests.e2e.conftest import ROOT, TINY

pytestmark = pytest.mark.timeout(180)
STEPS = 3


def trained(*flags: str) -> tuple[list[float], list[list[int]], dict[str, Any]]:
    """Losses and samples of each step, then the weights."""
    os.chdir(ROOT)
    job = load_training_job(parse_train_flags([
        "--mm-model", f"{TINY}/model.json", "--mm-data", f"{TINY}/data.json", "--fsdp2-config-path", f"{TINY}/fsdp2.yaml",
        "--train-iters", str(STEPS), "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-3", "--seed", "5",
        "--num-workers", "0", *flags,
    ]))  # fmt: skip
    trainer = Trainer(job, Accelerator.current(), None, build_dataset(job.components["dataset"], 5))
    losses, samples = [], []
    with trainer.inputs:
        for _ in range(STEPS):
            report = trainer._train_step(lambda: False)
            losses.append(report.read()[1])
            samples.append(list(report.samples))
    weights = {name: whole(p) for name, p in trainer.model.predictor.named_parameters()}
    return losses, samples, weights


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_losses_and_weights_are_those_of_a_run_without(ranks: int) -> None:
    for with_it, without in zip(
        run_ranks(trained, ranks, "--encode-ahead", timeout=120),
        run_ranks(trained, ranks, timeout=120),
        strict=True,
    ):
        assert with_it[:2] == without[:2]
        for name, tensor in without[2].items():
            np.testing.assert_array_equal(with_it[2][name], tensor, err_msg=name)
