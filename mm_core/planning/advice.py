"""What to change so that a job fits, or runs faster: each change is planned like the job itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mm_core.config import TrainingJob
from mm_core.config.flags import world_size
from mm_core.planning.model import Advice, PlanResult, StepCosts
from mm_core.sharding.plan import ShardingPlan
from mm_registry.errors import UserError

_ROUNDS = 3
"""Changes that are made together at most."""
_MUCH = 0.2
"""Part of a step that waits for communication, from which less of it is worth a try."""
_MACHINE = 8
"""Devices of a machine, as all the known ones have."""


@dataclass(frozen=True)
class Change:
    """Another setting of a job.

    Args:
        write: what to write, and where.
        why: one sentence.
        job: with the setting.
    """

    write: str
    why: str
    job: TrainingJob


def advise(
    job: TrainingJob, result: PlanResult, replan: Callable[[TrainingJob], PlanResult]
) -> tuple[Advice, ...]:
    """What to change, best first: where the job does not fit, what lets it fit, else what makes it faster and still fits.

    Where no change by itself is enough, the one that costs least time for each byte is kept, and others are tried on top
    of it.

    Args:
        result: of the job, without advice.
        replan: plans another job; its errors drop the change.
    """
    if result.fits:
        found = [
            _advice(change.write, change.why, other)
            for change in _faster(job, result)
            if (other := _planned(change.job, replan)) is not None
            and other.fits
            and other.time.total < 0.98 * result.time.total
        ]
        return tuple(sorted(found, key=lambda one: one.seconds or 0.0))
    tried: list[Advice] = []
    base, written, best = job, "", result
    for _ in range(_ROUNDS):
        step: list[tuple[Change, PlanResult]] = []
        for change in _smaller(base, best.costs):
            other = _planned(change.job, replan)
            if other is not None and other.peak_bytes < 0.99 * best.peak_bytes:
                step.append((change, other))
                tried.append(_advice(_together(written, change.write), change.why, other))
        if not step or any(other.fits for _, other in step):
            break
        change, other = min(step, key=lambda pair: _cost(pair[1], best))
        best = other
        base, written = change.job, _together(written, change.write)
    return tuple(sorted(tried, key=_order))


def _cost(result: PlanResult, before: PlanResult) -> float:
    """Seconds for each byte that a change saves."""
    return (result.time.total - before.time.total) / (before.peak_bytes - result.peak_bytes)


def _order(one: Advice) -> tuple[bool, float, float]:
    """What fits comes first, by time; then what comes closest."""
    return not one.fits, (one.seconds or 0.0) if one.fits else 0.0, one.peak_bytes


def _together(before: str, change: str) -> str:
    return f"{before}; {change}" if before else change


def _advice(write: str, why: str, result: PlanResult) -> Advice:
    return Advice(write, result.peak_bytes, result.time.total, result.fits, why)


def _planned(job: TrainingJob, replan: Callable[[TrainingJob], PlanResult]) -> PlanResult | None:
    """The plan of a change; None if the model or the ranks do not allow it."""
    try:
        return replan(job)
    except UserError:
        return None


def _smaller(job: TrainingJob, costs: StepCosts) -> Iterator[Change]:
    """Changes that take less memory, those that cost least time first."""
    plan = costs.plan
    world = world_size(job.flags)
    sizes = job.parallel
    fsdp2 = job.fsdp2
    sharing = sizes.sharing(world)
    shards = fsdp2.shard_group_size(sharing)
    if shards < sharing:
        yield _with_file(
            job,
            "sharding_size: auto",
            "each rank stores a smaller part of the parameters",
            sharding_size="auto",
        )
    if plan.reshard_after_forward is not True:
        yield _with_file(
            job,
            "reshard_after_forward: true",
            "gathered parameters are freed after the forward pass, and gathered once more",
            reshard_after_forward=True,
        )
    whole = len(fsdp2.recompute_modules or ()) == 0 and fsdp2.recompute_num_layers is None
    if not plan.recompute:
        yield _with_file(
            job,
            "recompute_granularity: selective",
            "norms and activations are computed again, matrix products and attention are kept",
            recompute_granularity="selective",
            recompute_modules=None,
        )
    if not plan.recompute or plan.recompute_granularity != "full" or not whole:
        yield _with_file(
            job,
            "recompute_granularity: full",
            "every unit keeps only its inputs",
            recompute_granularity="full",
            recompute_modules=None,
            recompute_num_layers=None,
        )
    blocks = _blocks(costs)
    if blocks and not plan.offload_activations:
        yield _with_file(
            job,
            f"offload_activations: ['{blocks}']",
            "what all but two units saved waits in host memory",
            offload_activations=(blocks,),
        )
    if job.flags.micro_batch_size > 1:
        half = job.flags.micro_batch_size // 2
        yield _with_flag(job, f"--micro-batch-size {half}", "fewer samples at once", micro_batch_size=half)
    experts = math.gcd(_experts(plan), sharing)
    if experts > sizes.ep:
        yield _with_file(
            job,
            f"expert_parallel_size: {experts}",
            "each rank holds fewer experts",
            expert_parallel_size=experts,
        )
    yield _with_flag(
        job,
        f"--context-parallel-size {2 * sizes.cp}",
        "twice as many ranks share each sequence",
        context_parallel_size=2 * sizes.cp,
    )
    if not plan.offload_to_cpu:
        yield _with_file(
            job,
            "offload_to_cpu: true",
            "parameters, gradients and optimizer states lie in host memory",
            offload_to_cpu=True,
        )


def _faster(job: TrainingJob, result: PlanResult) -> Iterator[Change]:
    """Changes that take less time and more memory."""
    plan, sizes, world = result.costs.plan, job.parallel, world_size(job.flags)
    if result.time.exposed > _MUCH * result.time.total:
        experts = math.gcd(_experts(plan), sizes.sharing(world))
        if experts > plan.expert_parallel_size:
            yield _with_file(
                job,
                f"expert_parallel_size: {experts}",
                "tokens travel to the experts, whose weights are not gathered",
                expert_parallel_size=experts,
            )
        if job.fsdp2.shard_group_size(sizes.sharing(world)) > _MACHINE and _MACHINE % sizes.cp == 0:
            yield _with_file(
                job,
                f"sharding_size: {_MACHINE}",
                "weights are gathered inside a machine",
                sharding_size=_MACHINE,
            )
    if plan.recompute and plan.recompute_granularity == "full":
        yield _with_file(
            job,
            "recompute_granularity: selective",
            "matrix products and attention are kept, and not computed again",
            recompute_granularity="selective",
        )
    if plan.recompute:
        yield _with_file(
            job,
            "recompute_modules: []",
            "nothing is computed twice",
            recompute_modules=(),
            recompute_granularity=None,
            recompute_num_layers=None,
        )
    if plan.reshard_after_forward is True:
        yield _with_file(
            job,
            "reshard_after_forward: false",
            "parameters are gathered once, not twice",
            reshard_after_forward=False,
        )
    if plan.offload_to_cpu:
        yield _with_file(job, "offload_to_cpu: false", "nothing lies in host memory", offload_to_cpu=False)


def _blocks(costs: StepCosts) -> str | None:
    """A pattern of the units of which there are most, if they are counted: `predictor.blocks.{*}`."""
    most = max(costs.units, key=lambda unit: unit.count)
    before, _, last = most.path.rpartition(".")
    return f"{costs.plan.full_path(before)}.{{*}}" if most.count > 2 and last.isdigit() else None


def _experts(plan: ShardingPlan) -> int:
    """Experts of a layer, 1 if there are none: transformers' modules hold them in dimension 0 of their parameters."""
    names = (p for unit in plan.units for p in unit.parameters if "experts" in p.name.split("."))
    return next((p.shape[0] for p in names if len(p.shape) == 3), 1)


def _with_file(job: TrainingJob, write: str, why: str, **values: Any) -> Change:
    changed = job.fsdp2.model_copy(update=values)
    return Change(f"{write} in the sharding file", why, dataclasses.replace(job, fsdp2=changed))


def _with_flag(job: TrainingJob, write: str, why: str, **values: Any) -> Change:
    """The global batch is part of what is written: by default it follows from the sizes, and a step would be another."""
    flags = job.flags.model_copy(update=values)
    write = f"{write} --global-batch-size {flags.global_batch_size}"
    return Change(write, why, dataclasses.replace(job, flags=flags))
