"""A rank's memory over one step: what computation holds, from a trace, and what FSDP2 and the optimizer hold beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mm_core.planning.fsdp_memory import FsdpMemory, Layout, group_bytes
from mm_core.planning.model import MemoryEvent, Phase, RankBytes, Timeline
from mm_core.planning.recorder import Segment
from mm_core.planning.trace import Trace
from mm_core.sharding.activations import offloaded_modules
from mm_core.sharding.plan import ALIGNED, ShardingPlan


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is held beside the traced root, and how often a step runs it.

    Args:
        other_bytes: parameters of components that are not traced, such as an expert that this step does not run, and the
            gradients that it waits with.
        other_states: what the optimizer keeps for them.
        optimizer_states: copies of the trained parameters that the optimizer keeps; AdamW's two, one more for an
            average of the weights.
        optimizer_transient: how many such copies a step of the optimizer makes for a moment: none if it is fused.
        micro_batches: of a step.
    """

    other_bytes: int = 0
    other_states: int = 0
    optimizer_states: int = 2
    optimizer_transient: int = 0
    micro_batches: int = 1


def timeline(plan: ShardingPlan, trace: Trace, layout: Layout, keeping: Keeping = Keeping()) -> Timeline:
    """Compose one step after the first.

    Args:
        plan: of the traced root.
        trace: one micro batch of it.
        layout: how its parameters lie on the ranks.
        keeping: the rest.
    """
    step = _Step(plan, trace, layout, keeping)
    for micro in range(min(2, keeping.micro_batches)):  # a third is as the second
        step.run(micro)
    step.optimizer()
    return Timeline(tuple(step.events), step.host_bytes, max(step.away, default=0))


def activations_away(segments: Sequence[Segment], modules: Collection[str]) -> list[int]:
    """Bytes of activations that wait in host memory during each segment (`mm_core.sharding.offload`).

    What a module saved leaves the device when the next one has run, and comes back when the backward pass reaches the
    next one; the last one's stays. What lies between the beginnings of two modules is taken to be the first one's.

    Args:
        modules: those that are offloaded, as segments name their units.
    """
    enters = [s for s in segments if s.phase == "forward" and s.boundary == "enter" and s.unit in modules]
    saved = {a.unit: max(0, b.live - a.live) for a, b in pairwise(enters)}
    before = {b.unit: a.unit for a, b in pairwise(enters)}
    gone: set[str] = set()
    away: list[int] = []
    for segment in segments:
        away.append(sum(saved[unit] for unit in gone))
        if segment.unit in modules and segment.boundary == "leave" and segment.phase == "forward":
            gone |= {before[segment.unit]} if segment.unit in before else set()
        elif segment.boundary == "begin":
            gone -= {segment.unit, before.get(segment.unit, "")}
    return away


def steady_bytes(
    plan: ShardingPlan, layout: Layout, numel: Mapping[str, int], keeping: Keeping, held: int = 0
) -> tuple[RankBytes, int]:
    """What is there between steps: on the device, and on the host.

    Args:
        numel: as in `group_bytes`.
        held: bytes of parameters and buffers that are not sharded.
    """
    groups = [group_bytes(plan, unit, layout, numel) for unit in (*plan.units, plan.root)]
    stored = sum(group.stored for group in groups)
    states = sum(group.trained for group in groups) * keeping.optimizer_states
    if plan.offload_to_cpu and not layout.host_counts:
        return RankBytes(
            parameters=held + keeping.other_bytes, optimizer=keeping.other_states
        ), stored + states
    states += keeping.other_states
    return RankBytes(parameters=stored + held + keeping.other_bytes, optimizer=states), 0


class _Step:
    """Walks through the segments of a trace."""

    def __init__(self, plan: ShardingPlan, trace: Trace, layout: Layout, keeping: Keeping) -> None:
        self.plan, self.trace, self.layout, self.keeping = plan, trace, layout, keeping
        self.events: list[MemoryEvent] = []
        self.steady, self.host_bytes = steady_bytes(plan, layout, trace.numel, keeping, trace.held)
        self.fsdp = FsdpMemory(plan, layout, trace.numel, self._moment)
        self.on_host = plan.offload_to_cpu and not layout.host_counts
        if self.on_host:  # gradients go there too
            self.host_bytes += sum(group.trained for group in self.fsdp.groups.values())
        self.phase: Phase = "prepare"
        self.unit = ""
        self.micro = 0
        self.live = 0
        self.whole = 0
        moved = () if layout.host_counts else offloaded_modules(plan)
        self.away = activations_away(trace.segments, moved)
        self.gone = 0  # of `away`, now
        self.running: list[str] = []
        self.aligned = ALIGNED in self.fsdp.groups

    def run(self, micro: int) -> None:
        """One micro batch."""
        self.micro, self.live, self.running = micro, 0, []
        left: dict[str, int] = {}
        aligned_seen = False
        for segment, gone in zip(self.trace.segments, self.away, strict=True):
            self.phase, self.gone = segment.phase, gone
            self._segment(segment)
            unit = segment.unit
            match segment.boundary:
                case "enter":
                    self._push(unit)
                    self.fsdp.enter(unit, in_backward=segment.phase == "backward")
                    if self.aligned and unit and not aligned_seen:
                        aligned_seen = True
                        self.fsdp.enter(ALIGNED)
                        self.fsdp.leave(ALIGNED)
                case "leave":
                    if segment.phase != "backward":
                        self.fsdp.leave(unit)
                    self._pop(unit)
                case "begin":
                    self._push(unit)
                    self.fsdp.begin_backward(unit)
                case "end":
                    own = segment.whole_after.get(unit, 0)
                    self.whole = segment.whole_after_total - own
                    self.fsdp.end_backward(unit, own)
                    self._pop(unit)
            left = dict(segment.whole_after)
        self.whole = self.gone = 0
        self.phase, self.unit = "reduce", ""
        self.fsdp.finish({unit: size for unit, size in left.items() if size})
        self.live = 0

    def optimizer(self) -> None:
        """The optimizer's step: gradients are scaled and clipped in place, states exist."""
        self.phase, self.unit, self.live = "optimizer", "", 0
        trained = sum(group.trained for group in self.fsdp.groups.values())
        self._event(0, trained * self.keeping.optimizer_transient, 0)

    def _push(self, unit: str) -> None:
        self.running.append(unit)
        self.unit = unit

    def _pop(self, unit: str) -> None:
        if self.running and self.running[-1] == unit:
            self.running.pop()
        self.unit = self.running[-1] if self.running else ""

    def _segment(self, segment: Segment) -> None:
        """What computation held since the last mark."""
        kept = min(segment.peak, max(self.live, segment.live))
        self.whole = sum(segment.whole.values())
        self._event(kept, segment.peak - kept, self.whole)
        self.live = segment.live
        self.whole = segment.whole_after_total

    def _moment(self, extra: int) -> None:
        """Something of FSDP2's, between two operations of the computation."""
        self._event(self.live, extra, self.whole)

    def _event(self, activations: int, transient: int, whole: int) -> None:
        gradients, reducing = self.fsdp.gradients, self.fsdp.reducing + whole
        if not self.layout.wrapped:  # whole gradients are all that there are
            gradients, reducing = gradients + whole, 0
        if self.on_host:
            gradients = 0
        self.events.append(
            MemoryEvent(
                self.phase,
                self.unit,
                replace(
                    self.steady,
                    gradients=gradients,
                    gathered=self.fsdp.gathered,
                    reducing=reducing,
                    activations=max(0, activations - self.gone),
                    transient=transient,
                ),
                self.micro,
            )
        )
