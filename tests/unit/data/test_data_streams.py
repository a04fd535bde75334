"""Iterable datasets: shares of ranks and workers, epochs, and positions that are continued exactly."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from mm_core.config.data import DataConfig
from mm_core.data import DataError, build_loader
from mm_core.data.positions import from_json, to_json

pytestmark = pytest.mark.timeout(120)


class Numbers(IterableDataset):
    """0 … size-1; each with a number drawn from the global generators, and the epoch."""

    def __init__(self, size: int = 10, fail_at: int | None = None) -> None:
        self.size, self.fail_at = size, fail_at
        self.next, self.epoch = 0, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self.next = self.next, 0
        for value in range(start, self.size):
            self.next = value + 1
            if value == self.fail_at:
                raise DataError("clip 3 is broken")
            yield {"value": value, "drawn": random.random() + float(torch.rand(())), "epoch": self.epoch}
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "seen": torch.tensor([self.next])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["seen"].item() == state["next"]
        self.next = state["next"]


class Sharded(Numbers):
    """Reads its own share only."""

    def shard(self, num_shards: int, index: int) -> Sharded:
        mine = Sharded(self.size)
        mine.share = (num_shards, index)  # type: ignore[attr-defined]
        return mine

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, index = self.share  # type: ignore[attr-defined]
        return (item for item in super().__iter__() if item["value"] % count == index)


def build(
    dataset: Any, *, workers: int = 0, rank: int = 0, ranks: int = 1, consumed: int = 0, position: Any = None
) -> Any:
    data = DataConfig.model_validate({"dataset_param": {"dataset_type": "t2v"}})
    return build_loader(
        dataset, data, seed=5, dp_rank=rank, dp_size=ranks, micro_batch_size=2, global_batch_size=2 * ranks,
        num_workers=workers, consumed_samples=consumed, position=position,
    )  # fmt: skip


def rows(batches: Any) -> list[tuple[Any, ...]]:
    keys = ("value", "epoch", "drawn", "sample_index")
    return [tuple(batch[key][i].item() for key in keys) for batch in batches for i in range(2)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Numbers, Sharded])
def test_a_stream_goes_on_exactly_where_it_was(workers: int, kind: type[Numbers]) -> None:
    torch.manual_seed(1)
    random.seed(1)
    loader = build(kind(), workers=workers)
    batches = iter(loader)
    first = rows(islice(batches, 4))  # into the second epoch with the next one
    position = json.loads(json.dumps(loader.state_dict()))
    generators = torch.get_rng_state(), random.getstate()  # of the main process: a checkpoint has them anyway
    rest = rows(islice(batches, 7))
    torch.set_rng_state(generators[0])
    random.setstate(generators[1])
    again = rows(islice(build(kind(), workers=workers, consumed=8, position=position), 7))
    assert again == rest
    assert [row[3] for row in first + rest] == list(range(22)), "the consumed-sample index"
    once = sorted(value for value, epoch, *_ in first + rest if epoch == 0)
    assert once == list(range(10)), "each sample once in an epoch"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Numbers, Sharded])
def test_ranks_share_a_stream(workers: int, kind: type[Numbers]) -> None:
    shares = [rows(islice(build(kind(16), workers=workers, rank=rank, ranks=2), 4)) for rank in range(2)]
    assert sorted(row[0] for share in shares for row in share) == list(range(16))
    assert sorted(row[3] for share in shares for row in share) == list(range(16))


def test_a_stream_without_a_sample_for_everyone_is_an_error() -> None:
    with pytest.raises(DataError, match="Numbers gave 1 samples in an epoch, and 2 processes read it"):
        next(iter(build(Numbers(1), rank=1, ranks=2)))
    with pytest.raises(DataError, match="gave no sample in an epoch"):
        next(iter(build(Numbers(0))))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_stream_says_about_its_data_is_told_as_it_is(workers: int) -> None:
    with pytest.raises(DataError, match=r"^clip 3 is broken$"):
        list(islice(build(Numbers(fail_at=3), workers=workers), 4))


def test_a_position_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError, match="position of the data cannot be used"):
        next(iter(build(Numbers(), position={"no": "position"})))
    with pytest.raises(DataError, match="cannot be read: nothing is of kind 'code'"):
        build(Numbers(), position={"$kind": "code"})


def test_positions_hold_what_datasets_return() -> None:
    value = {
        "n": 1, "x": 0.5, "none": None, "list": [1, (2, "é")], "set": {3, 1}, "bytes": b"\x00\xff", 7: "seven",
        "tensor": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "empty": torch.zeros(0, 4), "scalar": torch.tensor(3),
        "array": np.arange(4, dtype=np.uint32), "python": random.getstate(), "$kind": "mine",
    }  # fmt: skip
    back = from_json(json.loads(json.dumps(to_json(value))))
    assert back.keys() == value.keys()
    for key, item in value.items():
        if isinstance(item, torch.Tensor):
            assert back[key].dtype == item.dtype
            assert torch.equal(back[key], item)
        elif isinstance(item, np.ndarray):
            assert back[key].dtype == item.dtype
            assert (back[key] == item).all()
        else:
            assert back[key] == item
    with pytest.raises(DataError, match=r"state\.open is a Random, which a checkpoint cannot hold"):
        to_json({"open": random.Random(1)})


class Careless:
    """A map-style dataset that draws from the global generators."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "value": index,
            "epoch": 0,
            "drawn": random.random() + float(np.random.rand()) + float(torch.rand(())),
        }


def test_what_a_map_style_dataset_draws_follows_the_sample_alone() -> None:
    before = torch.get_rng_state()
    straight = rows(islice(build(Careless()), 6))
    assert torch.equal(before, torch.get_rng_state()), (
        "neither the loader nor the dataset moves the run's generators"
    )
    resumed = rows(islice(build(Careless(), workers=2, consumed=4), 4))
    assert resumed == straight[4:]
    assert len({row[2] for row in straight}) == len(straight)
