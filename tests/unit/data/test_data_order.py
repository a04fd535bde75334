from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.data.errors import DataError
from mm_core.data.order import GlobalOrder, MicroBatchSampler


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(global batch size, data-parallel ranks, micro batch size) that fit."""
    ranks, micro, accumulation = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return ranks * micro * accumulation, ranks, micro


def consumed(
    order: GlobalOrder, layout: tuple[int, int, int], steps: int, start: int = 0
) -> list[list[tuple[int, int]]]:
    """The slots of each optimizer step, over all ranks, by the documented formula's loops."""
    global_batch, ranks, micro = layout
    samplers = [
        iter(
            MicroBatchSampler(
                order,
                dp_rank=rank,
                dp_size=ranks,
                micro_batch_size=micro,
                global_batch_size=global_batch,
                consumed_samples=start,
            )
        )
        for rank in range(ranks)
    ]
    accumulation = global_batch // (ranks * micro)
    return [
        [slot for _ in range(accumulation) for sampler in samplers for slot in next(sampler)]
        for _ in range(steps)
    ]


@settings(max_examples=100, deadline=None)
@given(layout=layouts(), size=st.integers(1, 40), seed=st.integers(0, 2**31), steps=st.integers(1, 6))
def test_every_layout_consumes_the_same_samples_in_the_same_order(
    layout: tuple[int, int, int], size: int, seed: int, steps: int
) -> None:
    order = GlobalOrder(size, seed)
    step_size = layout[0]
    expected = [(order[k], k) for k in range(steps * step_size)]
    assert [slot for step in consumed(order, layout, steps) for slot in step] == expected


@settings(max_examples=50, deadline=None)
@given(layout=layouts(), size=st.integers(1, 40), done=st.integers(0, 5))
def test_a_resume_goes_on_where_the_run_stopped(layout: tuple[int, int, int], size: int, done: int) -> None:
    order = GlobalOrder(size, seed=3)
    whole = consumed(order, layout, done + 4)
    assert consumed(GlobalOrder(size, seed=3), layout, 4, start=done * layout[0]) == whole[done:]


@settings(max_examples=50)
@given(size=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = GlobalOrder(size, seed)
    assert sorted(order[epoch * size + i] for i in range(size)) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = GlobalOrder(50, seed)
        return [order[number * 50 + i] for i in range(50)]

    orders = [epoch(1, 0), epoch(1, 1), epoch(2, 0), list(range(50))]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch(1, 1) == orders[1]


def test_without_shuffling_the_set_is_read_in_its_order() -> None:
    order = GlobalOrder(3, seed=1, shuffle=False)
    assert [order[k] for k in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_the_formula_literally() -> None:
    order = GlobalOrder(1000, seed=0, shuffle=False)
    ranks, micro, global_batch = 2, 3, 12
    for rank in range(ranks):
        sampler = MicroBatchSampler(
            order, dp_rank=rank, dp_size=ranks, micro_batch_size=micro, global_batch_size=global_batch
        )
        batches = list(islice(sampler, 4))
        for step in range(2):
            for accumulation in range(2):
                expected = [
                    step * global_batch + accumulation * ranks * micro + rank * micro + slot
                    for slot in range(micro)
                ]
                assert [k for _, k in batches[step * 2 + accumulation]] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 5}, r"global batch size 5 is not a multiple of 4 .* choose a multiple of 4"),
        ({"micro_batch_size": 0}, "at least 1"),
        ({"dp_rank": 2}, "rank 2 is not among 2"),
        ({"consumed_samples": -1}, "cannot be negative"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    sizes = {"dp_rank": 0, "dp_size": 2, "micro_batch_size": 2, "global_batch_size": 4} | changes
    with pytest.raises(DataError, match=message):
        MicroBatchSampler(GlobalOrder(3, seed=0), **sizes)


def test_an_empty_set_has_no_order() -> None:
    with pytest.raises(DataError, match="no sample"):
        GlobalOrder(0, seed=1)


def test_indices_before_the_first_are_an_error() -> None:
    with pytest.raises(IndexError, match="start at 0"):
        GlobalOrder(3, seed=1)[-1]
