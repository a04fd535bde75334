"""Every sample of a validation set once, on any number of ranks, each time the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from mm_core.config.data import DataConfig
from mm_core.data import DataError
from mm_core.data.validation import ValidationBatches

DATA = DataConfig.model_validate({"dataset_param": {"dataset_type": "t2v"}})


class Numbers:
    """Samples that draw."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"value": torch.tensor(index), "drawn": torch.rand(())}


class Stream(IterableDataset[Any]):
    def __init__(self, size: int, bad: int = -1) -> None:
        self.size, self.bad, self.first = size, bad, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.first, self.size):
            if number == self.bad:
                raise DataError(f"sample {number} is bad")
            yield {"value": torch.tensor(number)}

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("a validation set is read from its beginning")


def batches_of(dataset: Any, rank: int = 0, ranks: int = 1, size: int = 2, **more: Any) -> ValidationBatches:
    return ValidationBatches(
        dataset, DATA, seed=5, dp_rank=rank, dp_size=ranks, micro_batch_size=size, **more
    )


def counted(batches: ValidationBatches) -> list[list[tuple[int, float]]]:
    """(sample, what it drew) of the batches that count."""
    return [
        list(zip(batch["value"].tolist(), batch.get("drawn", batch["value"]).tolist(), strict=True))
        for batch, samples in batches
        if samples
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 17), st.integers(1, 5), st.integers(1, 4), st.none() | st.integers(1, 20))
def test_ranks_share_a_set_without_a_rest(size: int, ranks: int, micro: int, limit: int | None) -> None:
    torch.manual_seed(size)  # what a sample draws does not depend on it
    alone = counted(batches_of(Numbers(size), size=micro, limit=limit))
    shares = [batches_of(Numbers(size), rank, ranks, micro, limit=limit) for rank in range(ranks)]
    assert (
        len({len(list(share)) for share in shares}) == 1
    )  # a model that is sharded is called as often everywhere
    dealt = [counted(share) for share in shares]
    together = [dealt[k % ranks][k // ranks] for k in range(len(alone))]
    assert together == alone
    assert sum(map(len, dealt)) == len(alone)
    assert [value for batch in alone for value, _ in batch] == list(range(min(size, limit or size)))


def test_a_batch_says_which_samples_it_has_and_whether_they_count() -> None:
    batches = list(batches_of(Numbers(5), rank=1, ranks=2))
    assert [(batch["sample_index"].tolist(), samples) for batch, samples in batches] == [
        ([2, 3], 2),
        ([0], 0),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_dealt_out_and_begins_anew(workers: int) -> None:
    shares = [batches_of(Stream(9), rank, 2, num_workers=workers) for rank in range(2)]
    for _ in range(2):
        seen = sorted(value for share in shares for batch in counted(share) for value, _ in batch)
        assert seen == list(range(9))
    with pytest.raises(TypeError, match="does not tell"):
        len(shares[0])


def test_of_a_long_stream_a_part_is_read() -> None:
    batches = batches_of(Stream(10**9), limit=6)
    assert [batch["value"].tolist() for batch, _ in batches] == [[0, 1], [2, 3], [4, 5]]


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(DataError, match="the validation set has no sample"):
        batches_of(Numbers(0))
    with pytest.raises(DataError, match=r"^sample 3 is bad$"):
        list(batches_of(Stream(5, bad=3)))
