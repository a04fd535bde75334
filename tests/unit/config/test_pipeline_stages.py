"""Which blocks a stage has, and which schedule runs them."""

from __future__ import annotations

import pytest

from mm_core.config.parallel import ParallelSizes
from mm_core.config.pipeline_stages import (
    idle_share,
    layout_problem,
    schedule_name,
    schedule_problem,
    stage_blocks,
)


def blocks(count: int, **sizes: object) -> list[list[int]]:
    return [list(stage) for stage in stage_blocks(count, ParallelSizes(**sizes))]  # type: ignore[arg-type]


def test_blocks_are_dealt_out_in_the_order_of_the_stages() -> None:
    assert blocks(5, pp=2, layers=((3, 2),)) == [[0, 1, 2], [3, 4]]
    # Rank 0 has the first and the third of these stages.
    assert blocks(6, pp=2, vpp=2, layers=((1, 2), (2, 1))) == [[0], [1, 2], [3, 4], [5]]


def test_without_a_list_they_are_dealt_out_evenly() -> None:
    assert [len(stage) for stage in blocks(40, pp=4)] == [10] * 4
    assert [len(stage) for stage in blocks(7, pp=3)] == [3, 2, 2]
    assert [block for stage in blocks(30, pp=4, vpp=2) for block in stage] == list(range(30))


PROBLEMS = [
    (4, {"pp": 2, "layers": ((3, 2),)}, "pipeline_num_layers adds up to 5, but the model has 4 blocks; write entries that "
     "add up to 4"),
    (4, {"pp": 2, "layers": ((4,),)}, "pipeline_num_layers is [4], but --pipeline-model-parallel-size 2 needs 2 numbers"),
    (4, {"pp": 2, "vpp": 2, "layers": ((2, 2),)}, "pipeline_num_layers is [2, 2], but --pipeline-model-parallel-size 2 × "
     "--virtual-pipeline-model-parallel-size 2 needs 2 lists of 2 numbers"),
    (4, {"pp": 2, "layers": ((4, 0),)}, "pipeline_num_layers is [4, 0], but every stage needs a layer"),
    (3, {"pp": 2, "vpp": 2}, "--pipeline-model-parallel-size 2 × --virtual-pipeline-model-parallel-size 2 makes 4 stages "
     "of 3 blocks, but each needs one; use 3 stages at most"),
]  # fmt: skip


@pytest.mark.parametrize(("count", "sizes", "said"), PROBLEMS)
def test_a_layout_that_does_not_fit_is_said(count: int, sizes: dict[str, object], said: str) -> None:
    assert layout_problem(count, ParallelSizes(**sizes)) == said  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pipeline"):
        blocks(count, **sizes)


def test_the_schedule_follows_from_the_numbers() -> None:
    assert schedule_name(1, ParallelSizes(pp=2)) == "GPipe"
    assert schedule_name(4, ParallelSizes(pp=4)) == "1F1B"
    assert schedule_name(4, ParallelSizes(pp=2, vpp=2)) == "Interleaved1F1B"


def test_interleaving_wants_equal_rounds() -> None:
    sizes = ParallelSizes(pp=2, vpp=2)
    assert [count for count in range(1, 9) if schedule_problem(count, sizes) is not None] == [5, 7]
    problem = schedule_problem(5, sizes)
    assert problem is not None
    assert problem[1] == "Choose --global-batch-size so that there are 4 or 6"
    assert schedule_problem(5, ParallelSizes(pp=2)) is None


def test_more_parts_and_more_micro_batches_leave_less_time_idle() -> None:
    assert idle_share(1, ParallelSizes(pp=2)) == 0.5
    assert idle_share(7, ParallelSizes(pp=4)) == pytest.approx(0.3)
    assert idle_share(7, ParallelSizes(pp=4, vpp=2)) == pytest.approx(3 / 17)
