"""Losses, weights, metrics and the wish to stop, summed over micro batches and ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mm_core.training.sums import StepSums, StepTotals
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.timeout(90)


def step(stopping: tuple[int, ...]) -> StepTotals:
    rank = dist.get_rank()
    sums = StepSums(torch.device("cpu"))
    for number in range(1, rank + 2):  # uneven on purpose: rank 0 has one micro batch, rank 1 two
        losses = torch.tensor([1.0, 2.0], requires_grad=True) * number
        metrics = {"zeta": torch.tensor(10.0 * number), "alpha": torch.tensor(1.0)}
        sums.add(losses, torch.tensor([0.5, 1.0]), metrics, tokens=100)
    return sums.reduce(rank in stopping).totals()


@pytest.mark.parametrize("stopping", [(), (0,), (1,), (0, 1)])
def test_two_ranks_have_the_same_totals(stopping: tuple[int, ...]) -> None:
    totals = run_ranks(step, 2, stopping)
    assert totals[0] == totals[1]
    assert totals[0] == StepTotals(
        loss=3.0 + 3.0 + 6.0,
        weight=4.5,
        tokens=300.0,
        stop=bool(stopping),
        metrics={"alpha": 3.0, "zeta": 40.0},
    )


def test_one_rank() -> None:
    (total,) = run_ranks(step, 1, (0,))
    assert total == StepTotals(3.0, 1.5, 100.0, True, {"alpha": 1.0, "zeta": 10.0})


def half_precision() -> tuple[StepTotals, bool]:
    sums = StepSums(torch.device("cpu"))
    losses = torch.full((4096,), 0.1, dtype=torch.bfloat16, requires_grad=True)
    sums.add(losses * 1, torch.ones(4096, dtype=torch.bfloat16), {}, 0)
    return sums.reduce(False).totals(), sums.loss.requires_grad


def test_sums_are_fp32_and_keep_no_graph() -> None:
    ((total, keeps_graph),) = run_ranks(half_precision, 1)
    assert total.weight == 4096
    assert total.loss == pytest.approx(4096 * torch.tensor(0.1).bfloat16().item(), rel=1e-6)
    assert not keeps_graph
