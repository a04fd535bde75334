"""What ranks send each other in one step: by kind, group and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from mm_core.config.parallel import ParallelSizes
from mm_core.planning.model import Collective, StepCosts, UnitCost
from mm_core.sharding.plan import ShardingPlan, Unit, is_inside

FORWARD = "parameters, forward"
"""`Collective.what` of gathers that the forward pass hides; the backward pass hides the others."""
_KINDS = {
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
    "send": "send",
    "permute": "send",
}
"""Part of an operation's name -> kind. Receiving is the other side of sending."""
_WHAT = {
    "cp": "sequence against heads",
    "tp": "activations",
    "ep": "tokens to experts",
}


def sent(kind: str, size: int, ranks: int) -> int:
    """Bytes that one rank sends in a ring (all-to-all: directly) of `ranks`.

    Args:
        size: bytes of the whole tensor: the gathered one of an all-gather, the unreduced one of a reduce-scatter, the
            one that each rank holds of an all-reduce, an all-to-all or a send.
    """
    if kind == "send":
        return size
    if ranks == 1:
        return 0
    return size * (ranks - 1) * (2 if kind == "all-reduce" else 1) // ranks


def step_collectives(costs: StepCosts, sizes: ParallelSizes, world: int) -> tuple[Collective, ...]:
    """All collectives of one rank in one optimizer step, those of equal kind, group and purpose added up.

    Args:
        costs: of the rank.
        sizes: of the mesh.
        world: ranks of the job.
    """
    found = [
        *_parameters(costs, sizes, world),
        *(one for unit in costs.units for one in _inside(unit, sizes, costs.micro_batches)),
        *_stages(costs, sizes, world),
    ]
    return tuple(_added_up(one for one in found if one.bytes))


def _parameters(costs: StepCosts, sizes: ParallelSizes, world: int) -> Iterator[Collective]:
    """Gathers of parameters and reductions of gradients, of each unit and micro batch.

    Gradients are reduced over the shards in each micro batch; over replicas once, after the last (see
    `mm_core.training.step.GradientExchange`).
    """
    plan, shards, micro = costs.plan, costs.shards, costs.micro_batches
    sharing = sizes.sharing(world)
    # A frozen tower whose inputs need no gradient has no backward pass.
    forward_only = [
        p for c in costs.units if not (c.trainable_numel or c.flops.backward) for p in c.paths if p
    ]
    for unit in (*plan.units, plan.root):
        ep = plan.expert_parallel_size if unit.path in plan.experts else 1
        parts = max(1, shards // ep)
        copies = sharing // (parts * ep)
        group, stride = ("fsdp", sizes.tp) if ep == 1 else ("ep_shard", sizes.tp * ep)
        gathered, whole = _unit_bytes(plan, unit, costs.numel)
        again = _reshards(plan, unit) if not any(is_inside(unit.path, p) for p in forward_only) else False
        if parts > 1:
            yield _one("all-gather", group, parts, micro, gathered, FORWARD, stride)
            yield _one("reduce-scatter", group, parts, micro, whole, "gradients", stride)
            if again:
                ranks = parts if again is True else min(int(again), parts)
                yield _one("all-gather", group, ranks, micro, gathered, "parameters, backward", stride)
        if copies > 1:
            name = "dp_replicate" if ep == 1 else "ep_replicate"
            yield _one(
                "all-reduce", name, copies, 1, whole // parts, "gradients of the copies", stride * parts
            )


def _inside(unit: UnitCost, sizes: ParallelSizes, micro: int) -> Iterator[Collective]:
    """Those of a unit's own computation: the trace has counted the bytes that are handed to them."""
    ranks = {"cp": (sizes.cp, sizes.tp), "tp": (sizes.tp, 1), "ep": (sizes.ep, sizes.tp)}
    for key, size in unit.collectives.items():
        name, _, group = key.partition(" ")
        kind = next((kind for part, kind in _KINDS.items() if part in name.replace("_", "")), name)
        number, stride = ranks[group]
        whole = size * number if kind == "all-gather" else size
        what = "keys and values" if group == "cp" and kind == "send" else _WHAT[group]
        each = sent(kind, whole, number) * micro
        calls = unit.calls[key] * unit.count * micro
        yield Collective(kind, group, number, calls, unit.count * each, what, stride)


def _stages(costs: StepCosts, sizes: ParallelSizes, world: int) -> Iterator[Collective]:
    """What pipeline stages hand on, and the gradients that come back."""
    if sizes.pp == 1:
        return
    inner = [unit for unit in costs.units if unit.path]
    size = max((unit.output_bytes for unit in inner), default=0)
    count = 2 * costs.micro_batches * sizes.vpp
    yield Collective("send", "pp", sizes.pp, count, count * size, "hidden states", world // sizes.pp)


def _one(kind: str, group: str, ranks: int, count: int, size: int, what: str, stride: int) -> Collective:
    return Collective(kind, group, ranks, count, count * sent(kind, size, ranks), what, stride)


def _added_up(collectives: Iterable[Collective]) -> list[Collective]:
    sums: dict[tuple[object, ...], Collective] = {}
    for one in collectives:
        key = (one.kind, one.group, one.ranks, one.what, one.stride)
        before = sums.get(key)
        if before is not None:
            one = Collective(
                one.kind,
                one.group,
                one.ranks,
                before.count + one.count,
                before.bytes + one.bytes,
                one.what,
                one.stride,
            )
        sums[key] = one
    return list(sums.values())


def _unit_bytes(plan: ShardingPlan, unit: Unit, numel: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of a unit gathered in its compute dtype, and of its whole gradients in the dtype of their reduction."""
    gathered = whole = 0
    for p in unit.parameters:
        elements = numel.get(
            p.name, 0
        )  # fewer than the whole where experts or tensors are dealt out; none elsewhere
        compute = plan.param_dtype or p.dtype
        gathered += elements * compute.itemsize
        whole += elements * (plan.reduce_dtype or compute).itemsize if p.trainable else 0
    return gathered, whole


def _reshards(plan: ShardingPlan, unit: Unit) -> bool | int:
    """Whether a unit is gathered again for its backward pass; a number: over so many ranks only."""
    if unit.keep_gathered or not unit.path:
        return False
    if unit.path in plan.experts and not plan.reshard_local_experts:
        return False
    return plan.reshard_after_forward
