"""What a plan costs: a row for each unit, and the memory that parameters take at their peak."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch

from mm_core.accelerator import dtype_name
from mm_core.sharding.plan import ALIGNED, ParameterInfo, ShardingPlan, Unit, is_inside
from mm_core.sharding.prefetch import prefetch_lists

_ADAMW_STATES = 2


@dataclass(frozen=True)
class Peak:
    """Bytes of parameters and what belongs to them on the fullest rank, activations not counted.

    Args:
        shards: the stored parameters.
        gradients: their gradients, of the trained ones.
        optimizer: two states of AdamW for each.
        gathered: the most that is gathered at one time, units that are fetched ahead included.
        whole_gradients: gradients of the largest unit and of the root before they are reduced.
        on_host: whether the first three are in host memory (`offload_to_cpu`).
    """

    shards: int
    gradients: int
    optimizer: int
    gathered: int
    whole_gradients: int
    on_host: bool = False

    @property
    def stored(self) -> int:
        """What a rank holds all the time."""
        return self.shards + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The peak in the device's memory."""
        return (0 if self.on_host else self.stored) + self.gathered + self.whole_gradients


def unit_rows(plan: ShardingPlan, shards: int) -> list[dict[str, Any]]:
    """One row a unit, the root last.

    Args:
        shards: number of ranks that a parameter is cut over.

    `bytes_per_rank` counts the stored parameters of the fullest rank; `training_bytes_per_rank` these with
    gradients and AdamW's states; `gathered_bytes` the unit in its compute dtype. `prefetch` and
    `backward_prefetch` are the units that it asks for when its turn comes; null in backward leaves it to
    FSDP2, which asks for one.
    """
    forward, backward = prefetch_lists(plan)
    rows = []
    for unit in (*plan.units, plan.root):
        stored, gradients, states = _stored(plan, unit, shards)
        asked = [plan.full_path(path) for path in backward.get(unit.path, [])]
        rows.append(
            {
                "unit": plan.full_path(unit.path),
                "parameters": len(unit.parameters),
                "numel": unit.numel,
                "bytes_per_rank": stored,
                "training_bytes_per_rank": stored + gradients + states,
                "gathered_bytes": _gathered(plan, unit),
                "dtype": "/".join(sorted({dtype_name(_compute_dtype(plan, p)) for p in unit.parameters})),
                "recompute": _covered(plan, unit.path, plan.recompute),
                "offload": _covered(plan, unit.path, plan.offload_activations),
                "reshard": _reshard(plan, unit),
                "prefetch": [plan.full_path(path) for path in forward.get(unit.path, [])],
                "backward_prefetch": asked if plan.backward_prefetch else None,
            }
        )
    return rows


def is_wrapped(plan: ShardingPlan, ranks: int) -> bool:
    """Whether FSDP2 is used at all: one rank that computes in the parameters' own dtype has nothing to gather."""
    stored = {p.dtype for unit in (*plan.units, plan.root) for p in unit.parameters}
    dtypes = {plan.param_dtype, plan.reduce_dtype, plan.output_dtype} - {None}
    return ranks > 1 or plan.offload_to_cpu or (bool(dtypes) and dtypes != stored)


def peak_memory(plan: ShardingPlan, shards: int, *, wrapped: bool = True) -> Peak:
    """Predict the memory of parameters on the fullest rank.

    Args:
        shards: number of ranks that a parameter is cut over.
        wrapped: whether FSDP2 is used at all; without it nothing is gathered.
    """
    units = (*plan.units, plan.root)
    sums = [_stored(plan, unit, shards) for unit in units]
    stored, gradients, states = (sum(column) for column in zip(*sums, strict=True))
    if not wrapped:
        return Peak(stored, gradients, states, 0, 0)
    return Peak(
        stored,
        gradients,
        states,
        _most_gathered(plan, units),
        max((_whole_gradient(plan, unit) for unit in plan.units), default=0)
        + _whole_gradient(plan, plan.root),
        plan.offload_to_cpu,
    )


def _stored(plan: ShardingPlan, unit: Unit, shards: int) -> tuple[int, int, int]:
    """Bytes of its parameters, gradients and AdamW's states on the fullest rank."""
    parts, extra = shards, 1
    if unit.path in plan.experts:
        extra = plan.expert_parallel_size
        parts = max(1, shards // extra)
    stored = trained = 0
    for p in unit.parameters:
        own = p.shard_numel(parts) if extra == 1 else math.ceil(p.numel / (extra * parts))
        own //= plan.cut.get(p.name, 1)
        stored += own * p.dtype.itemsize
        trained += own * p.dtype.itemsize if p.trainable else 0
    return stored, trained, trained * _ADAMW_STATES


def _gathered(plan: ShardingPlan, unit: Unit) -> int:
    own = plan.expert_parallel_size if unit.path in plan.experts else 1
    return sum(
        p.numel // (own * plan.cut.get(p.name, 1)) * _compute_dtype(plan, p).itemsize for p in unit.parameters
    )


def _whole_gradient(plan: ShardingPlan, unit: Unit) -> int:
    """A gradient comes in the compute dtype, and is copied to the dtype of the reduction."""
    own = plan.expert_parallel_size if unit.path in plan.experts else 1
    total = 0
    for p in unit.parameters:
        if p.trainable:
            compute = _compute_dtype(plan, p)
            total += (
                p.numel
                // (own * plan.cut.get(p.name, 1))
                * (compute.itemsize + (plan.reduce_dtype or compute).itemsize)
            )
    return total


def _most_gathered(plan: ShardingPlan, units: Collection[Unit]) -> int:
    """The largest sum of what is gathered while one unit runs: it, those around it, those that it has asked for,
    and those that stay.
    """
    size = {unit.path: _gathered(plan, unit) for unit in units}
    stay = {unit.path for unit in units if _reshard(plan, unit) is False}
    partly = 0
    if plan.reshard_after_forward not in (True, False):
        partly = sum(size[u.path] for u in units if u.path not in stay) // int(plan.reshard_after_forward)
    forward, backward = prefetch_lists(plan)
    if not plan.backward_prefetch:  # FSDP2 asks for one by itself
        backward = prefetch_lists(replace(plan, backward_prefetch=1))[1]
    most = 0
    for asked in (forward, backward):
        for path in size:
            live = {path, *asked.get(path, ()), *stay}
            live |= {outer for outer in size if any(is_inside(p, outer) for p in live)}
            most = max(most, sum(size[p] for p in live))
    return most + partly


def _reshard(plan: ShardingPlan, unit: Unit) -> bool | int:
    if unit.keep_gathered or not unit.path:
        return False
    if unit.path in plan.experts:
        return bool(plan.reshard_after_forward) and plan.reshard_local_experts
    return plan.reshard_after_forward


def _compute_dtype(plan: ShardingPlan, parameter: ParameterInfo) -> torch.dtype:
    return plan.param_dtype or parameter.dtype


def _covered(plan: ShardingPlan, path: str, modules: Collection[str]) -> str:
    """`yes`, `no`, or which submodules of the unit are among the modules."""
    if path == ALIGNED:
        return "no"
    if any(is_inside(path, module) for module in modules):
        return "yes"
    if not path:
        return "no"
    inside = [module for module in modules if is_inside(module, path)]
    return ", ".join(module.removeprefix(path + ".") for module in inside) or "no"
