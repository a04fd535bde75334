"""Units are gathered in the order of execution, as far ahead as asked: the order that really happens, and the lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy, build_plan
from mm_core.sharding.plan import bare_name
from mm_core.sharding.prefetch import prefetch_lists
from mm_core.weights import materialize
from tests.distributed.harness import run_ranks
from tests.distributed.models import MOE, WAN, TinyModel
from tests.distributed.tiny import Composite

pytestmark = pytest.mark.timeout(120)
BLOCKS = ["blocks.0", "blocks.1", "blocks.2", "proj_out"]


def gathers(model: TinyModel, **fsdp2: Any) -> tuple[list[list[str]], list[list[str]]]:
    """What is gathered when in the second step: for each moment that FSDP2 begins with a unit, forward and backward,
    `[the unit, what is gathered then, in order]`.
    """
    composite = model.composite()
    composite.fully_shard(None, Fsdp2Config(**fsdp2))
    predictor = composite.predictor
    materialize(predictor, "cpu", 0)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model.loss(predictor, 0, rank, world)[0].backward()  # torch sets itself up in the first
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model.loss(predictor, 1, rank, world)[0].backward()
    passes: dict[str, list[list[str]]] = {"pre_forward": [], "pre_backward": []}
    current: list[list[str]] = []
    events = [e for e in profiled.events() if e.name.startswith("FSDP::")]
    for event in sorted(events, key=lambda e: e.time_range.start):
        what, _, unit = event.name.removeprefix("FSDP::").partition(" (")
        unit = bare_name(unit.removesuffix(")"))
        if what in passes:
            current = passes[what]
            current.append([unit])
        elif what == "all_gather":
            current[-1].append(unit)
    return passes["pre_forward"], passes["pre_backward"]


@pytest.mark.parametrize(("depth", "recompute"), [(0, False), (1, True), (2, False), (2, True)])
def test_the_order_of_gathering_is_the_planned_one(depth, recompute):
    fsdp2: dict[str, Any] = {"num_to_forward_prefetch": depth, "num_to_backward_prefetch": depth}
    if recompute:
        fsdp2["recompute_modules"] = ("predictor.blocks.{*}",)
    forward, backward = run_ranks(gathers, 2, WAN, **fsdp2)[0]
    # FSDP2 asks for one unit ahead in backward when it is told nothing.
    assert forward == expected(["", *BLOCKS], depth)
    assert backward == expected(["", *reversed(BLOCKS)], depth or 1, gathered={""})


def expected(order: list[str], depth: int, gathered: set[str] = frozenset()) -> list[list[str]]:
    """Each unit gathers itself if nothing did before, then the next ones that are not there yet."""
    there, moments = set(gathered), []
    for i, unit in enumerate(order):
        new = [other for other in order[i : i + 1 + depth] if other not in there]
        there.update(new)
        moments.append([unit, *new])
    return moments


LAYERS = [f"model.layers.{i}{part}" for i in range(3) for part in ("", ".mlp.experts")]
LAST_FIRST = [f"model.layers.{i}{part}" for i in (2, 1, 0) for part in ("", ".mlp.experts")]


@pytest.mark.parametrize("recompute", [{}, {"recompute_modules": ("predictor.model.layers.{*}",)}])
def test_experts_are_gathered_after_the_layer_around_them_both_ways(recompute):
    fsdp2 = {"num_to_forward_prefetch": 1, "num_to_backward_prefetch": 1, "expert_parallel_size": 2}
    forward, backward = run_ranks(gathers, 4, MOE, **fsdp2, **recompute)[0]
    assert forward == expected(["", *LAYERS], 1)
    assert backward == expected(["", *LAST_FIRST], 1, gathered={""})


@pytest.mark.slow
def test_reentrant_recomputation_gathers_nothing_that_was_freed_for_good():
    forward, backward = run_ranks(
        gathers, 4, MOE, num_to_forward_prefetch=1, num_to_backward_prefetch=1, expert_parallel_size=2,
        recompute_modules=("predictor.model.layers.{*}",), use_reentrant=True,
    )[0]  # fmt: skip
    assert [unit for moment in forward for unit in moment[1:]] == ["", *LAYERS]
    assert backward == expected(["", *LAST_FIRST], 1, gathered={""})


def plan_of(policy: ShardingPolicy, **fsdp2: Any) -> Any:
    return build_plan(Composite().predictor, policy, Fsdp2Config(**fsdp2))


def test_lists_end_at_the_ends_and_name_no_unit_twice():
    plan = plan_of(
        ShardingPolicy(units=("blocks.{*}", "proj_out")),
        num_to_forward_prefetch=3,
        num_to_backward_prefetch=9,
    )
    forward, backward = prefetch_lists(plan)
    assert forward == {
        "": BLOCKS[:3], "blocks.0": BLOCKS[1:], "blocks.1": BLOCKS[2:], "blocks.2": ["proj_out"], "proj_out": []
    }  # fmt: skip
    assert backward[""] == ["proj_out", "blocks.2", "blocks.1", "blocks.0"]
    assert backward["blocks.1"] == ["blocks.0"]
    assert backward["blocks.0"] == []


def test_units_inside_units_come_after_them_in_backward_too():
    policy = ShardingPolicy(units=("blocks.0", "blocks.0.attn1", "blocks.0.ffn", "blocks.1"))
    _, backward = prefetch_lists(plan_of(policy, num_to_backward_prefetch=1))
    assert backward == {
        "": ["blocks.1"], "blocks.1": ["blocks.0"], "blocks.0": ["blocks.0.ffn"], "blocks.0.ffn": ["blocks.0.attn1"],
        "blocks.0.attn1": [],
    }  # fmt: skip


def test_what_stays_gathered_is_not_asked_for_in_backward():
    policy = ShardingPolicy(units=("blocks.{*}", "proj_out"), keep_gathered=("blocks.2",))
    _, backward = prefetch_lists(plan_of(policy, num_to_backward_prefetch=1))
    assert backward == {"": ["proj_out"], "proj_out": ["blocks.1"], "blocks.1": ["blocks.0"], "blocks.0": []}
    kept = plan_of(policy, num_to_backward_prefetch=1, reshard_after_forward=False)
    assert prefetch_lists(kept)[1] == {"": []}
