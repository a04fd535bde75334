"""Small costs and plans, made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mm_core.planning.devices import Device
from mm_core.planning.model import (
    Flops,
    MemoryEvent,
    RankBytes,
    StepCosts,
    Timeline,
    UnitCost,
)
from mm_core.sharding.plan import ParameterInfo, ShardingPlan, Unit

DEVICE = Device(
    name="test device",
    memory_bytes=10_000,
    bf16_flops=2e6,
    fp32_flops=1e6,
    memory_bandwidth=1e5,
    host_bandwidth=1e3,
    node_size=4,
    node_bandwidth=1000.0,
    network_bandwidth=100.0,
    matmul_efficiency=0.5,
    attention_efficiency=0.25,
    bandwidth_efficiency=1.0,
    reserve=0.1,
)


def plan(blocks: int = 2, **settings: Any) -> ShardingPlan:
    """Blocks of 8 × 5 trained and 8 frozen elements, and a root of 16, all fp32."""
    units = tuple(
        Unit(
            f"blocks.{i}",
            (
                ParameterInfo(f"blocks.{i}.weight", (8, 5), torch.float32, True),
                ParameterInfo(f"blocks.{i}.scale", (8,), torch.float32, False),
            ),
        )
        for i in range(blocks)
    )
    root = Unit("", (ParameterInfo("head", (16,), torch.float32, True),))
    return ShardingPlan("predictor", units, root, **settings)


def costs(made: ShardingPlan | None = None, shards: int = 4, **changes: Any) -> StepCosts:
    """Of one micro batch on a rank: 6000 FLOPs, of which 2000 are attention's."""
    made = made or plan()
    numel = {p.name: p.numel for unit in (*made.units, made.root) for p in unit.parameters}
    flops = Flops(2000, 4000, 0, 700, 1300, 0)
    block = UnitCost("Block", tuple(u.path for u in made.units), 48, 40, flops.times(1), 100, 20, 30, 64, 64)
    root = UnitCost("(root)", ("",), 16, 16, Flops(), 10, 0, 0, 8, 0)
    events = (
        MemoryEvent("forward", "blocks.0", RankBytes(parameters=1000, activations=500)),
        MemoryEvent("backward", "blocks.1", RankBytes(parameters=1000, activations=700, transient=300)),
        MemoryEvent("optimizer", "", RankBytes(parameters=1000, gradients=1000)),
    )
    given: dict[str, Any] = {
        "parameters": 96,
        "frozen_parameters": 16,
        "units": (block, root),
        "timeline": Timeline(events),
        "steady": RankBytes(parameters=1000, optimizer=400),
        "flops": flops,
        "micro_batches": 1,
        "tokens": 32,
        "plan": made,
        "numel": numel,
        "shards": shards,
    }
    return StepCosts(**{**given, **changes})


def unit(**changes: Any) -> UnitCost:
    """The block of `costs`, changed."""
    return dataclasses.replace(costs().units[0], **changes)
