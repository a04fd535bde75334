"""The laws by which a step's samples are dealt to two experts, for any sizes."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.config.data import DataConfig
from mm_core.data import build_loader
from mm_core.data.dealing import DealtSlot, ExpertSampler
from mm_core.data.errors import DataError
from mm_core.data.order import GlobalOrder
from mm_core.random import keyed_seed


def owners(keys: Any) -> list[int]:
    """Some steps belong to one expert as a whole."""
    return [keyed_seed(3, "owner", k) % 5 // 3 if k // 8 % 4 else 1 for k in keys]


def bucket(index: int) -> int:
    return index % 3


def dealt(rank: int, dp: int, micro: int, total: int, first: int, **more: Any) -> list[list[DealtSlot]]:
    order = GlobalOrder(11, 0)
    sampler = ExpertSampler(
        order, owners, dp_rank=rank, dp_size=dp, micro_batch_size=micro, global_batch_size=total, **more
    )
    return list(sampler.step(first))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_each_sample_counts_once_and_ranks_run_the_same_experts(
    dp: int, micro: int, times: int, step: int, bucketed: bool
) -> None:
    total = dp * micro * times
    keys = range(step * total, (step + 1) * total)
    more: dict[str, Any] = {"bucket": bucket, "volume": lambda i: 1 + i % 3} if bucketed else {}
    ranks = [dealt(rank, dp, micro, total, keys[0], **more) for rank in range(dp)]
    slots = [slot for batches in ranks for batch in batches for slot in batch]
    order = GlobalOrder(11, 0)
    # Each sample of the step once, and by the expert that owns it; the rest has no weight.
    assert Counter(slot.key for slot in slots if slot.weight) == Counter(keys)
    assert all(slot.weight in (0.0, 1.0) and slot.sample == order[slot.key] for slot in slots)
    owned = dict(zip(keys, owners(keys), strict=True))
    assert all(slot.deal.expert == owned[slot.key] for slot in slots)
    # As many micro batches on each rank, full ones, of the same experts, high noise first.
    plans = [[batch[0].deal for batch in batches] for batches in ranks]
    assert all(plan == plans[0] for plan in plans)
    assert all(len(batch) == micro for batches in ranks for batch in batches)
    assert [deal.expert for deal in plans[0]] == sorted(deal.expert for deal in plans[0])
    assert {deal.expert for deal in plans[0]} == set(owned.values())
    # Where an expert's share and the step end.
    assert [deal.last_of_step for deal in plans[0]] == [False] * (len(plans[0]) - 1) + [True]
    for _, of_expert in groupby(plans[0], key=lambda deal: deal.expert):
        assert [deal.last_of_expert for deal in of_expert][::-1].index(True) == 0
    assert sum(deal.last_of_expert for deal in plans[0]) == len(set(owned.values()))
    if bucketed:
        assert all(
            len({bucket(slot.sample) for slot in batch}) == 1 for batches in ranks for batch in batches
        )
    # No more is computed than the laws ask for.
    if not bucketed:
        shares = Counter(owned.values())
        assert len(plans[0]) == sum(-(-count // (micro * dp)) for count in shares.values())


def test_a_step_does_not_depend_on_where_the_run_began() -> None:
    order = GlobalOrder(11, 0)
    sizes: dict[str, Any] = {"dp_rank": 1, "dp_size": 2, "micro_batch_size": 2, "global_batch_size": 8}
    whole, later = (iter(ExpertSampler(order, owners, **sizes, consumed_samples=k)) for k in (0, 16))
    skipped = 0
    while skipped < 2:
        skipped += next(whole)[0].deal.last_of_step
    assert [next(whole) for _ in range(12)] == [next(later) for _ in range(12)]


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def get(self, index: int, key: int) -> dict[str, Any]:
        return {"value": torch.tensor(float(index)), "file": str(index)}


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_tell_weights_and_where_a_step_ends(workers: int) -> None:
    sizes: dict[str, Any] = {"dp_rank": 0, "dp_size": 1, "micro_batch_size": 4, "global_batch_size": 8}
    data = DataConfig(dataset_param={})
    loader = build_loader(Numbers(), data, seed=0, num_workers=workers, owners=owners, **sizes)
    batches = iter(loader)
    seen: list[int] = []
    for _ in range(2):
        while True:
            batch = next(batches)
            assert batch["sample_weight"].dtype == torch.float32
            assert batch["sample_weight"].shape == (4,)
            real = batch["sample_weight"].bool()
            seen += batch["sample_index"][real].tolist()
            assert set(owners(batch["sample_index"].tolist())) == {batch["deal"].expert}
            if batch["deal"].last_of_step:
                break
    assert sorted(seen) == list(range(16))


def test_a_stream_cannot_be_dealt() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

        def __iter__(self) -> Any:
            return iter(())

    sizes: dict[str, Any] = {"dp_rank": 0, "dp_size": 1, "micro_batch_size": 4, "global_batch_size": 8}
    with pytest.raises(DataError, match="Stream is a stream"):
        build_loader(Stream(), DataConfig(dataset_param={}), seed=0, owners=owners, **sizes)
