"""What FSDP2 holds beside the computation: gathered parameters, whole gradients and the buffers of its collectives.

It follows `torch.distributed.fsdp._fully_shard` (torch 2.13) call by call; a few of its ways matter to the peak:

* An all-gather fills one flat buffer and copies it out to the parameters. In the forward pass the buffer stays until
  the next unit is gathered, so a unit takes twice its size; in the backward pass it goes at once, but the next unit's
  is filled already.
* A reduce-scatter's input is whole and in the dtype of the reduction; it stays until the next unit reduces.
* The root is gathered from its forward to the end of the step, and reduces its gradients last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mm_core.sharding.plan import ALIGNED, ParameterInfo, ShardingPlan, Unit
from mm_core.sharding.prefetch import prefetch_lists


@dataclass(frozen=True, slots=True)
class Layout:
    """How the parameters of one root lie on the ranks.

    Args:
        shards: ranks that a parameter is cut over.
        replicas: groups of those that hold the same.
        wrapped: whether FSDP2 is used at all.
        host_counts: host memory is the device's, as on a CPU.
    """

    shards: int = 1
    replicas: int = 1
    wrapped: bool = True
    host_counts: bool = False


@dataclass(frozen=True, slots=True)
class GroupBytes:
    """Bytes of one unit on the fullest rank.

    Args:
        stored: its shard of the parameters.
        trained: the part of it that is trained, as which gradients and each state of the optimizer are as large.
        gathered: whole parameters in the dtype of compute, padded to equal shards.
        buffer: the all-gather's flat output; none without other ranks.
        cast: this rank's shard in the dtype of compute, made for the all-gather.
        reduce_input: whole gradients in the dtype of the reduction.
        reduce_output: this rank's shard of them.
        reshard: freed after forward; a number: kept in so many parts.
    """

    stored: int
    trained: int
    gathered: int
    buffer: int
    cast: int
    reduce_input: int
    reduce_output: int
    reshard: bool | int


def group_bytes(plan: ShardingPlan, unit: Unit, layout: Layout, numel: Mapping[str, int]) -> GroupBytes:
    """The sizes of one unit.

    Args:
        numel: elements of parameters of which a rank computes with a part only, by name; others are whole.
    """
    parts = layout.shards
    if unit.path in plan.experts and plan.expert_parallel_size > 1:
        parts = max(1, layout.shards // plan.expert_parallel_size)
    stored = trained = gathered = cast = reduced = 0
    for p in unit.parameters:
        own = _shard(p, numel.get(p.name, p.numel), parts)
        compute = plan.param_dtype or p.dtype
        stored += own * p.dtype.itemsize
        gathered += own * parts * compute.itemsize
        cast += own * compute.itemsize if plan.param_dtype is not None else 0
        if p.trainable:
            trained += own * p.dtype.itemsize
            reduced += own * (plan.reduce_dtype or compute).itemsize
    return GroupBytes(
        stored, trained, gathered, gathered if parts > 1 else 0, cast if parts > 1 else 0,
        reduced * parts, reduced, _reshard(plan, unit),
    )  # fmt: skip


def _shard(parameter: ParameterInfo, local: int, parts: int) -> int:
    return parameter.shard_numel(parts) if local == parameter.numel else math.ceil(local / parts)


def _reshard(plan: ShardingPlan, unit: Unit) -> bool | int:
    if not unit.path:
        return False  # the root never is
    if unit.keep_gathered or unit.path == ALIGNED:
        return False
    if unit.path in plan.experts and plan.expert_parallel_size > 1:
        return bool(plan.reshard_after_forward) and plan.reshard_local_experts
    return plan.reshard_after_forward


class FsdpMemory:
    """FSDP2's part of a rank's memory, as its hooks change it.

    Args:
        plan: of the root.
        layout: of its parameters.
        numel: as in `group_bytes`.
        look: called at each moment at which something new is held, with bytes that are held for this moment only.

    Attributes:
        groups: sizes of each unit, the root under `""`.
        gathered, reducing, gradients: bytes that are held now.
    """

    def __init__(
        self, plan: ShardingPlan, layout: Layout, numel: Mapping[str, int], look: Callable[[int], None]
    ) -> None:
        self.plan, self.layout, self._look = plan, layout, look
        self.groups = {unit.path: group_bytes(plan, unit, layout, numel) for unit in (*plan.units, plan.root)}
        self._forward_prefetch, self._backward_prefetch = prefetch_lists(plan)
        self._whole: dict[str, int] = {}  # unit -> bytes gathered
        self._under_way: dict[str, int] = {}  # unit -> its all-gather's buffer
        self._partly: dict[str, int] = {}  # unit -> bytes that stay after forward, where that is a part
        self._last_buffer = self._reduce_buffer = self._waiting = 0
        self._replica_buffers = 0
        self._order: list[str] = []  # units as their forward passes ended
        self._reduced: set[str] = set()  # in this backward pass
        self.gradients = 0
        self._has_gradients: set[str] = set()

    @property
    def gathered(self) -> int:
        """Whole parameters, and buffers of all-gathers."""
        held = (self._whole, self._under_way, self._partly)
        return sum(sum(one.values()) for one in held) + self._last_buffer

    @property
    def reducing(self) -> int:
        """Buffers of reductions, and whole gradients whose turn comes last."""
        return self._reduce_buffer + self._replica_buffers + self._waiting

    def enter(self, unit: str, *, in_backward: bool = False) -> None:
        """A unit is called: in the forward pass, or inside a recomputation."""
        group = self.groups.get(unit)
        if group is None or not self.layout.wrapped:
            return
        self._gather(unit)
        if unit in self._under_way:
            self._last_buffer = 0
            self._copy_out(unit)
            self._last_buffer = group.buffer
        if not in_backward:
            for other in self._forward_prefetch.get(unit, ()):
                self._gather(other)

    def leave(self, unit: str) -> None:
        """The forward pass of a unit is over."""
        group = self.groups.get(unit)
        if group is None or not self.layout.wrapped:
            return
        if group.reshard is not False and unit in self._whole:
            del self._whole[unit]
            if group.reshard is not True:  # a part of the whole parameters, cloned
                self._partly[unit] = group.gathered // group.reshard
                self._look(group.gathered)
        self._order.append(unit)
        if not unit:
            self._last_buffer = 0

    def begin_backward(self, unit: str) -> None:
        """The gradients of a unit's results are there."""
        if unit not in self.groups or not self.layout.wrapped:
            return
        self._gather(unit)
        if unit in self._under_way:
            self._copy_out(unit)
        if self._backward_prefetch.get(unit):
            for other in self._backward_prefetch[unit]:
                self._gather(other)
        elif unit in self._order:
            place = len(self._order) - 1 - self._order[::-1].index(unit)
            if place > 0:
                self._gather(self._order[place - 1])

    def end_backward(self, unit: str, whole: int) -> None:
        """The backward pass of a unit is over: its gradients are reduced.

        Args:
            whole: bytes of the unit's whole gradients.
        """
        group = self.groups.get(unit)
        if group is None:
            return
        if not self.layout.wrapped:
            self.gradients += whole
            return
        self._whole.pop(unit, None)
        if unit in self._order:
            del self._order[len(self._order) - 1 - self._order[::-1].index(unit)]
        if not group.reduce_input or not whole or unit in self._reduced:
            return
        self._reduced.add(unit)
        self._reduce_buffer = group.reduce_input
        self._look_with(whole)
        # The gradients are copied in and gone; the output comes, and is copied to the parameters' dtype.
        same = group.reduce_output == group.trained
        extra = group.reduce_output + (0 if same else group.trained)
        self._look_with(extra)
        if unit not in self._has_gradients:
            self._has_gradients.add(unit)
            self.gradients += group.trained
        if self.layout.replicas > 1 and not same:
            self._replica_buffers += group.reduce_output

    def _look_with(self, reducing: int) -> None:
        self._waiting += reducing
        self._look(0)
        self._waiting -= reducing

    def finish(self, whole: Mapping[str, int]) -> None:
        """The backward pass is over; what has not been reduced is now.

        Args:
            whole: bytes of whole gradients that are left, by unit; each goes when its turn comes.
        """
        self._waiting = sum(whole.values())
        for unit in self.groups:
            size = whole.get(unit, 0)
            self._waiting -= size
            self.end_backward(unit, size)
        self._waiting = 0
        self._whole.clear()
        self._under_way.clear()
        self._partly.clear()
        self._order.clear()
        self._reduced.clear()
        self._reduce_buffer = self._replica_buffers = self._last_buffer = 0

    def _gather(self, unit: str) -> None:
        if unit in self._whole or unit in self._under_way:
            return
        group = self.groups[unit]
        self._under_way[unit] = group.buffer
        self._look(group.cast)

    def _copy_out(self, unit: str) -> None:
        group = self.groups[unit]
        self._partly.pop(unit, None)
        self._whole[unit] = group.gathered
        self._look(0)
        del self._under_way[unit]
