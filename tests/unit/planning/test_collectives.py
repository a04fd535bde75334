"""What ranks send, against sums made by hand; `tests/distributed/test_plan_collectives.py` compares with real runs."""

from __future__ import annotations

import pytest

from mm_core.config.parallel import ParallelSizes
from mm_core.planning.collectives import sent, step_collectives
from mm_core.planning.model import Collective, Flops
from tests.unit.planning.made import costs, plan, unit

ONE = ParallelSizes()


def by_group(collectives: tuple[Collective, ...]) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    return {(c.kind, c.group, c.what): (c.ranks, c.count, c.bytes) for c in collectives}


def test_sent() -> None:
    assert sent("all-gather", 800, 4) == 600
    assert sent("reduce-scatter", 800, 4) == 600
    assert sent("all-reduce", 800, 4) == 1200
    assert sent("all-to-all", 800, 4) == 600
    assert sent("send", 800, 2) == 800
    assert sent("all-reduce", 800, 1) == 0


def test_one_rank_sends_nothing() -> None:
    assert step_collectives(costs(shards=1), ONE, 1) == ()


def test_sharded_over_all_ranks() -> None:
    found = by_group(step_collectives(costs(), ONE, 4))
    # Two blocks of 48 and the root of 16 elements in fp32, three quarters of which
    # come from others; frozen ones have no gradient.
    assert found == {
        ("all-gather", "fsdp", "parameters, forward"): (4, 3, (2 * 48 + 16) * 4 * 3 // 4),
        ("all-gather", "fsdp", "parameters, backward"): (4, 2, 2 * 48 * 4 * 3 // 4),
        ("reduce-scatter", "fsdp", "gradients"): (4, 3, (2 * 40 + 16) * 4 * 3 // 4),
    }


def test_dtypes_of_compute_and_reduction() -> None:
    import torch

    made = plan(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = by_group(step_collectives(costs(made), ONE, 4))
    assert found["all-gather", "fsdp", "parameters, forward"][2] == (2 * 48 + 16) * 2 * 3 // 4
    assert found["reduce-scatter", "fsdp", "gradients"][2] == (2 * 40 + 16) * 4 * 3 // 4


def test_parameters_that_stay_are_gathered_once() -> None:
    found = by_group(step_collectives(costs(plan(reshard_after_forward=False)), ONE, 4))
    assert ("all-gather", "fsdp", "parameters, backward") not in found


def test_parameters_kept_over_fewer_ranks() -> None:
    found = by_group(step_collectives(costs(plan(reshard_after_forward=2)), ONE, 4))
    assert found["all-gather", "fsdp", "parameters, backward"] == (2, 2, 2 * 48 * 4 // 2)


def test_a_frozen_tower_is_gathered_once() -> None:
    frozen = unit(paths=("blocks.0",), trainable_numel=0, flops=Flops(forward=10))
    found = by_group(step_collectives(costs(units=(frozen,)), ONE, 4))
    assert found["all-gather", "fsdp", "parameters, forward"][1] == 3
    assert found["all-gather", "fsdp", "parameters, backward"][1] == 1


def test_copies_exchange_once_a_step() -> None:
    found = by_group(step_collectives(costs(shards=2, micro_batches=3), ONE, 8))
    assert found["reduce-scatter", "fsdp", "gradients"] == (2, 9, 3 * (2 * 40 + 16) * 4 // 2)
    # Four copies of half the gradients, each sent and received in a ring.
    assert found["all-reduce", "dp_replicate", "gradients of the copies"] == (
        4,
        3,
        (2 * 20 + 8) * 4 * 2 * 3 // 4,
    )


def test_links_of_the_groups() -> None:
    strides = {c.group: c.stride for c in step_collectives(costs(shards=2), ParallelSizes(tp=2), 16)}
    assert strides == {"fsdp": 2, "dp_replicate": 4}


@pytest.mark.parametrize(
    ("key", "kind", "whole"),
    [
        ("all_to_all_single cp", "all-to-all", 600),
        ("allgather_base_ cp", "all-gather", 2400),
        ("all_reduce tp", "all-reduce", 1200),
        ("send cp", "send", 800),
    ],
)
def test_collectives_inside_units(key: str, kind: str, whole: int) -> None:
    block = unit(collectives={key: 800}, calls={key: 3})
    made = costs(units=(block,), micro_batches=2, shards=1)
    (one,) = [c for c in step_collectives(made, ParallelSizes(cp=4, tp=4), 16) if c.group in ("cp", "tp")]
    # Two blocks, two micro batches.
    assert (one.kind, one.ranks, one.count, one.bytes) == (kind, 4, 2 * 2 * 3, 2 * 2 * whole)


def test_stages_send_both_ways() -> None:
    made = costs(micro_batches=4, shards=1)
    (one,) = step_collectives(made, ParallelSizes(pp=2), 2)
    assert (one.kind, one.group, one.count, one.bytes) == ("send", "pp", 8, 8 * 64)
