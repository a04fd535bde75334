"""What a validation adds up to, and when it runs. On many ranks: tests/distributed/test_validation.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from mm_core.accelerator import Accelerator
from mm_core.config.data import DataConfig
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.data.validation import ValidationBatches
from mm_core.sharding.mesh import build_parallel_mesh
from mm_core.training.validation import Validation, ValidationSums
from tests.distributed.harness import run_ranks

DATA = DataConfig.model_validate({"dataset_param": {"dataset_type": "t2v"}})


def test_sums_are_exact_and_leave_out_what_does_not_count() -> None:
    sums = ValidationSums()
    sums.add((torch.tensor([2.0**24]), torch.tensor([1.0]), {"parts": torch.tensor(3.0)}), 1)
    for _ in range(3):
        sums.add((torch.tensor([1.0]), torch.tensor([1.0]), {"parts": torch.tensor(1.0)}), 1)
    sums.add((torch.tensor([math.nan]), torch.tensor([5.0]), {"parts": torch.tensor(9.0)}), 0)
    sums.add(None, 2)
    total = sums.reduce()
    assert (total.loss, total.weight, total.samples) == (2.0**24 + 3, 4.0, 6)
    assert total.means() == {"val_loss": (2.0**24 + 3) / 4, "val_parts": 1.5}


@pytest.mark.parametrize("losses", [[math.inf, -math.inf], [math.nan, 1.0]])
def test_what_is_not_finite_is_no_number(losses: list[float]) -> None:
    sums = ValidationSums()
    sums.add((torch.tensor(losses), torch.ones(2), {}), 2)
    assert math.isnan(sums.reduce().means()["val_loss"])
    assert math.isnan(ValidationSums().reduce().means()["val_loss"])  # nothing has a weight


class Model(nn.Module):
    sharding_plans: dict[str, Any] = {}  # noqa: RUF012


class Identity:
    """A task whose losses are the samples' own numbers."""

    def prepare(self, micro_batches: Any) -> Iterator[Any]:
        yield from micro_batches

    def forward(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        assert not model.training
        torch.rand(3)  # as dropout in a model that forgets to look
        return inputs["value"].float()

    def loss(self, outputs: torch.Tensor, inputs: Any) -> Any:
        return outputs, torch.ones_like(outputs), {"squares": (outputs**2).sum()}


class Stream(IterableDataset[Any]):
    """One rank of two gets all items but one."""

    def __init__(self, sizes: tuple[int, int], rank: int = -1) -> None:
        self.sizes, self.rank = sizes, rank

    def shard(self, number: int, index: int) -> Stream:
        return Stream(self.sizes, index)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for value in range(self.sizes[self.rank]):
            yield {"value": torch.tensor(value + 10 * self.rank)}

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def validated(sizes: tuple[int, int], stopped: bool) -> Any:
    torch.manual_seed(0)
    mesh = build_parallel_mesh(Fsdp2Config())
    batches = ValidationBatches(
        Stream(sizes), DATA, seed=0, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, micro_batch_size=2
    )
    model, task = Model().train(), Identity()
    validation = Validation(
        model, task, batches, mesh=mesh, accelerator=Accelerator.current(), interval=4, last_step=6
    )  # type: ignore[arg-type]
    due = [step for step in range(1, 8) if validation.due(step)]
    before = torch.get_rng_state()
    result = validation.run(4, lambda: stopped and mesh.dp_rank == 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    result.pop("val_seconds", None)
    return due, result


def test_streams_of_unequal_length_and_a_stop() -> None:
    for due, result in run_ranks(validated, 2, (5, 1), False):
        assert due == [4, 6]
        assert result == {
            "val_loss": pytest.approx(20 / 6),
            "val_squares": pytest.approx(130 / 6),
            "val_samples": 6,
        }
    assert [result for _, result in run_ranks(validated, 2, (5, 1), True)] == [{}, {}]
    with pytest.raises(Exception, match="a stream, of which 1 of 2 ranks got no sample"):
        run_ranks(validated, 2, (5, 0), False)
