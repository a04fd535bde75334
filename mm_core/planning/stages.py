"""Pipeline stages: the part of a trace of the whole model that belongs to one stage, with what waits there."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from mm_core.config.parallel import ParallelSizes
from mm_core.config.pipeline_stages import stage_blocks
from mm_core.planning.model import UnitCost
from mm_core.planning.recorder import Segment
from mm_core.planning.trace import Trace
from mm_core.sharding.plan import ALIGNED, ShardingPlan, Unit, is_inside


@dataclass(frozen=True)
class Stage:
    """One rank's part of a pipeline.

    Args:
        plan: of what the rank has.
        trace: one micro batch of it; micro batches that wait for their backward pass are counted in it.
    """

    plan: ShardingPlan
    trace: Trace


def stage_traces(
    plan: ShardingPlan, trace: Trace, blocks: Collection[str], sizes: ParallelSizes, micro_batches: int
) -> Iterator[Stage]:
    """Cut the trace of a whole model at the bounds of its pipeline stages, one for each rank of a pipeline.

    In 1F1B (PipeDream-Flush, arXiv:2006.09503) stage `s` of `p` holds the activations of at most `p - s` micro batches;
    interleaved with `v` parts a rank (Megatron-LM, arXiv:2104.04473), `((p - s - 1) · 2 + (v - 1) · p + 1) / v`.

    Args:
        plan, trace: of the whole model.
        blocks: names of the blocks below `plan.pipeline.blocks`, in order.
        micro_batches: of a step.
    """
    policy = plan.pipeline
    assert policy is not None, "pipeline_problem refuses what has no policy"
    names = list(blocks)
    layout = stage_blocks(len(names), sizes)
    for rank in range(sizes.pp):
        own = [index for index in range(len(layout)) if index % sizes.pp == rank]
        kept = {f"{policy.blocks}.{names[i]}" for index in own for i in layout[index]}
        cut = _Cut(plan, trace, kept, first=rank == 0, last=own[-1] == len(layout) - 1)
        waiting: float = sizes.pp - rank
        if sizes.vpp > 1:
            waiting = ((sizes.pp - rank - 1) * 2 + (sizes.vpp - 1) * sizes.pp + 1) / sizes.vpp
        yield cut.stage(min(waiting, micro_batches))


class _Cut:
    """One stage of a model."""

    def __init__(
        self, plan: ShardingPlan, trace: Trace, kept: Collection[str], *, first: bool, last: bool
    ) -> None:
        assert plan.pipeline is not None
        self.plan, self.trace, self.policy = plan, trace, plan.pipeline
        self.kept, self.first, self.last = kept, first, last

    def has(self, name: str) -> bool:
        """Whether a module or parameter is on this stage."""
        if is_inside(name, self.policy.blocks) and name != self.policy.blocks:
            return any(is_inside(name, block) for block in self.kept)
        ends = ((self.policy.first, self.first), (self.policy.last, self.last))
        return all(here or not any(is_inside(name, path) for path in paths) for paths, here in ends)

    def stage(self, waiting: float) -> Stage:
        """The plan and the trace of the stage.

        Args:
            waiting: micro batches whose activations are held at the same time.
        """
        segments = self._segments()
        plan = self._plan()
        units = tuple(cost for unit in self.trace.units if (cost := self._unit(unit, plan)) is not None)
        travelling = 0 if self.first else max((u.output_bytes for u in units if u.path), default=0)
        ends = [s.live for s in segments if s.phase != "backward"]
        held = (ends[-1] if ends else 0) + travelling
        extra = int(held * (waiting - 1)) + travelling
        numel = {name: size for name, size in self.trace.numel.items() if self.has(name)}
        moved = tuple(segment.at(extra) for segment in segments)
        return Stage(plan, replace(self.trace, segments=moved, units=units, numel=numel))

    def _plan(self) -> ShardingPlan:
        def of(unit: Unit) -> Unit:
            return replace(unit, parameters=tuple(p for p in unit.parameters if self.has(p.name)))

        units = [of(unit) for unit in self.plan.units if unit.path == ALIGNED or self.has(unit.path)]
        experts = tuple(path for path in self.plan.experts if self.has(path))
        return replace(
            self.plan,
            units=tuple(unit for unit in units if unit.parameters),
            root=of(self.plan.root),
            experts=experts,
            aligned=tuple(path for path in self.plan.aligned if self.has(path)),
        )

    def _unit(self, unit: UnitCost, plan: ShardingPlan) -> UnitCost | None:
        if unit.path:
            paths = tuple(path for path in unit.paths if self.has(path))
            return replace(unit, paths=paths) if paths else None
        # What the root computes itself is the ends' work: half of it each, but for one stage alone.
        if not (self.first or self.last):
            return replace(
                unit,
                flops=unit.flops.times(0),
                moved_bytes=0,
                saved_bytes=0,
                parameter_numel=0,
                trainable_numel=0,
                collectives={},
                calls={},
            )
        numel = [self.trace.numel[p.name] for p in plan.root.parameters if p.name in self.trace.numel]
        return replace(unit, parameter_numel=sum(numel))

    def _segments(self) -> list[Segment]:
        """Those of the stage, as if nothing of the others were alive."""
        found: list[Segment] = []
        running: list[str] = []
        removed = before = 0
        here = self.first  # the root's own work belongs to the stage of the unit before it
        for segment in self.trace.segments:
            running, unit = _running(running, segment), (running or [""])[0]
            outer = unit or (segment.unit if segment.boundary in ("enter", "begin") else "")
            if outer and outer != ALIGNED:
                here = self.has(outer)
            elif segment.phase == "loss":
                here = self.last
            if here:
                found.append(segment.at(-removed))
            else:
                removed += segment.live - before
            before = segment.live
        return found


def _running(running: list[str], segment: Segment) -> list[str]:
    """The units that run after a segment, outermost first, without the root."""
    if not segment.unit:
        return running
    if segment.boundary in ("enter", "begin"):
        return [*running, segment.unit]
    if segment.boundary in ("leave", "end") and running and running[-1] == segment.unit:
        return running[:-1]
    return running
