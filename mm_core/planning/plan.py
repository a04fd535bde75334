"""A whole plan of a job for one kind of device."""

from __future__ import annotations

import dataclasses

from mm_core.config import TrainingJob
from mm_core.config.flags import world_size
from mm_core.planning.advice import advise
from mm_core.planning.collectives import step_collectives
from mm_core.planning.devices import Device
from mm_core.planning.job import step_costs
from mm_core.planning.model import PlanResult
from mm_core.planning.roofline import step_time


def plan_job(job: TrainingJob, device: Device, *, with_advice: bool = True) -> PlanResult:
    """Plan a job without its weights, data and devices: models are built on the meta device, and one unit of each kind
    is traced.

    Args:
        job: whose flags say how many ranks there are.
        with_advice: also plan what could be changed; each change is a plan of its own.

    Raises:
        UserError: the model cannot be built, sharded over these ranks, or traced.
    """
    result = _plan(job, device)
    if not with_advice:
        return result
    return dataclasses.replace(result, advice=advise(job, result, lambda other: _plan(other, device)))


def _plan(job: TrainingJob, device: Device) -> PlanResult:
    world, sizes = world_size(job.flags), job.parallel
    costs = step_costs(job, world)
    collectives = step_collectives(costs, sizes, world)
    return PlanResult(
        costs=costs,
        world_size=world,
        sizes={
            "dp": sizes.data_parallel(world),
            "cp": sizes.cp,
            "tp": sizes.tp,
            "pp": sizes.pp,
            "ep": sizes.ep,
        },
        device=device.name,
        device_bytes=device.memory_bytes,
        collectives=collectives,
        time=step_time(costs, collectives, device, sizes),
        fits=costs.timeline.peak_bytes <= device.memory_bytes * (1 - device.reserve),
    )
