"""Tracing one unit of each kind, against tracing every unit and against real tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.planning.fsdp_memory import FsdpMemory, Layout
from mm_core.planning.job import fake_ranks
from mm_core.planning.kinds import structure_of
from mm_core.planning.memory import Keeping, steady_bytes, timeline
from mm_core.planning.model import Flops
from mm_core.planning.stages import stage_traces
from mm_core.planning.trace import Trace, trace_micro_batch
from mm_core.sharding import ShardingPolicy
from mm_core.sharding.build import build_plan
from mm_core.sharding.mesh import build_device_mesh
from mm_core.sharding.plan import ShardingPlan
from mm_core.sharding.policy import PipelinePolicy

WIDTH, TOKENS = 32, 24


class Block(nn.Module):
    """Reads its input twice and a shared condition, and hands on a new tensor."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x) * condition)))


class Net(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.condition = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block(i) for i in range(blocks))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        condition = self.condition(x)
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        output: torch.Tensor = self.head(hidden)
        return output


def traced(units: tuple[str, ...], world: int = 1, **fsdp2: Any) -> tuple[Trace, ShardingPlan]:
    with torch.device("meta"):
        root = Net()
    policy = ShardingPolicy(units=units, pipeline=PipelinePolicy("blocks", ("embed", "condition"), ("head",)))
    config = Fsdp2Config(**{"sub_modules_to_wrap": tuple(f"net.{u}" for u in units), **fsdp2})
    plan = build_plan(root, policy, config, "net")
    with fake_ranks(world):
        mesh = build_device_mesh(config)
        trace = trace_micro_batch(
            root, plan, mesh, lambda m, x: (m(x).square().sum(),), prepare=lambda: torch.empty(TOKENS, 8)
        )
    return trace, plan


def total(trace: Trace) -> Flops:
    flops = Flops()
    for unit in trace.units:
        flops = flops + unit.flops.times(unit.count)
    return flops


@pytest.mark.parametrize("recompute", [(), ("net.blocks.{*}",)], ids=["kept", "recomputed"])
def test_stand_ins_hold_and_compute_what_the_units_would(recompute: tuple[str, ...]) -> None:
    (short, _), (whole, _) = (traced(units, recompute_modules=recompute) for units in (("blocks.{*}",), ()))
    assert [(unit.kind, unit.count) for unit in short.units] == [("Block", 4), ("(root)", 1)]
    assert [unit.count for unit in whole.units] == [1]
    assert total(short) == total(whole)
    # In the backward pass the whole model keeps all gradients, which the units hand on.
    peaks = [max(s.peak for s in trace.segments if s.phase != "backward") for trace in (short, whole)]
    assert peaks[0] == pytest.approx(peaks[1], abs=64)  # stand-ins have a few numbers of their own

    def after_forward(trace: Trace) -> int:
        return next(s.live for s in reversed(trace.segments) if s.phase == "loss")

    assert after_forward(short) == pytest.approx(after_forward(whole), abs=64)
    assert whole.segments[-1].whole_after_total == 4 * sum(whole.numel.values())
    # Gradients of units are reduced when their turn is over, the root's at the end.
    assert short.segments[-1].whole_after_total == 4 * short.units[-1].parameter_numel


def test_flops_are_those_of_real_tensors() -> None:
    net = Net()
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(TOKENS, 8)).square().sum().backward()
    assert total(traced(("blocks.{*}",))[0]).total == counter.get_total_flops()


def test_a_unit_is_known_by_what_it_computes() -> None:
    first, second = Block(0), Block(1)
    assert structure_of(first) == structure_of(second)
    second.norm.eps = 1e-3
    assert structure_of(first) != structure_of(second)
    third = Block(2)
    third.up.bias.requires_grad_(False)
    assert structure_of(first) != structure_of(third)


def test_stages_hold_together_what_the_model_holds() -> None:
    trace, plan = traced(("blocks.{*}",))
    sizes = ParallelSizes(pp=2, layers=((3, 1),))
    stages = list(stage_traces(plan, trace, ["0", "1", "2", "3"], sizes, micro_batches=1))
    assert [[unit.count for unit in stage.trace.units if unit.path] for stage in stages] == [[3], [1]]
    assert sum(sum(s.trace.numel.values()) for s in stages) == sum(trace.numel.values())
    assert [{p.name for p in s.plan.root.parameters} for s in stages] == [
        {"embed.weight", "embed.bias", "condition.weight", "condition.bias"},
        {"head.weight", "head.bias"},
    ]
    # The first stage keeps another micro batch while the second works on one.
    alone, two = (
        next(iter(stage_traces(plan, trace, ["0", "1", "2", "3"], sizes, n))).trace.segments for n in (1, 2)
    )
    assert two[-1].live - alone[-1].live == max(s.live for s in alone if s.phase == "forward")


def test_real_values_make_known_shapes() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(8))

        def forward(self, x: torch.Tensor, mask: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            parts = (x * self.scale)[mask].split(sizes.tolist())
            return torch.cat([part * 2 for part in parts])

    with torch.device("meta"):
        root = Masked()
    plan = build_plan(root, ShardingPolicy(), Fsdp2Config(), "")
    mask = torch.arange(6) < 4
    seen: list[tuple[int, ...]] = []

    def forward(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor]:
        y = module(x, mask, sizes)
        seen.append(tuple(y.shape))
        return (y.sum(),)

    sizes = torch.tensor([1, 3])
    with fake_ranks(1):
        trace_micro_batch(
            root, plan, build_device_mesh(Fsdp2Config()), forward, prepare=lambda: torch.empty(6, 8)
        )
    assert seen == [(4, 8)]


def test_more_ranks_hold_less_and_gathering_takes_twice_a_unit() -> None:
    trace, plan = traced(("blocks.{*}",), 4)
    lines = [timeline(plan, trace, Layout(shards)) for shards in (2, 4)]
    assert lines[0].peak.bytes.parameters == pytest.approx(2 * lines[1].peak.bytes.parameters, rel=0.1)
    looked: list[int] = []
    memory = FsdpMemory(plan, Layout(4), trace.numel, lambda _: looked.append(memory.gathered))
    memory.enter("blocks.0")
    unit = memory.groups["blocks.0"].gathered
    assert max(looked) == memory.gathered == 2 * unit
    memory.leave("blocks.0")
    assert memory.gathered == unit  # the buffer stays until the next unit is gathered


def test_accumulated_gradients_are_there_in_the_second_micro_batch() -> None:
    from mm_core.planning.memory import Keeping

    trace, plan = traced(("blocks.{*}",), 4)
    once, twice = (timeline(plan, trace, Layout(4), Keeping(micro_batches=n)) for n in (1, 2))
    assert once.events[0].bytes.gradients == 0
    second = next(event for event in twice.events if event.micro == 1)
    assert second.bytes.gradients == once.events[-1].bytes.gradients > 0
    assert replace(once, events=once.events[-1:]).moment == "optimizer step"


def test_what_is_offloaded_lies_in_host_memory() -> None:
    """Parameters, gradients and AdamW's two states."""
    trace, plan = traced(("blocks.{*}",), world=2, offload_to_cpu=True)
    stored = steady_bytes(replace(plan, offload_to_cpu=False), Layout(2), {}, Keeping())[0].parameters
    assert timeline(plan, trace, Layout(2)).host_bytes == 4 * stored
