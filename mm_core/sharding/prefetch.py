"""Gathering units ahead of their turn, in the order of execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule

from mm_core.sharding.plan import ALIGNED, ShardingPlan, is_inside


def prefetch_lists(plan: ShardingPlan) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Which units each unit (`""` is the root) asks for when its own turn comes: in forward, and in backward.

    A number of 0 gives empty lists. In backward they leave the choice to FSDP2, which asks for one unit.
    """
    forward = _ahead(["", *(unit.path for unit in plan.units)], plan.forward_prefetch)
    backward = _ahead(["", *_gathered_again(plan)], plan.backward_prefetch)
    return _without_repetition(forward, plan) if plan.use_reentrant else forward, backward


def set_prefetch(modules: Mapping[str, nn.Module], plan: ShardingPlan) -> None:
    """Ask for the next units in the order of execution, forward and backward.

    Args:
        modules: FSDP modules by the path of their unit; `""` is the root.
    """
    ahead, behind = prefetch_lists(plan)
    for path, others in ahead.items():
        if others:
            _fsdp(modules[path]).set_modules_to_forward_prefetch([_fsdp(modules[other]) for other in others])
    for path, others in behind.items():
        if others:
            _fsdp(modules[path]).set_modules_to_backward_prefetch([_fsdp(modules[other]) for other in others])


def _gathered_again(plan: ShardingPlan) -> list[str]:
    """The units that are gathered a second time in backward, in the order in which it begins with them.

    That is the reverse of the forward pass, but a unit around others begins before them both times.
    """
    if plan.reshard_after_forward is False:
        return []
    paths = [unit.path for unit in plan.units if unit.path != ALIGNED]
    outer = {
        path: max((o for o in paths if o != path and is_inside(path, o)), key=len, default="")
        for path in paths
    }

    def below(parent: str) -> list[str]:
        inner = [path for path in reversed(paths) if outer[path] == parent]
        return [visited for path in inner for visited in (path, *below(path))]

    kept = {unit.path for unit in plan.units if unit.keep_gathered}
    if not plan.reshard_local_experts:
        kept |= set(plan.experts)
    return [path for path in below("") if path not in kept]


def _ahead(order: Sequence[str], depth: int) -> dict[str, list[str]]:
    return {path: list(order[i + 1 : i + 1 + depth]) for i, path in enumerate(order)}


def _without_repetition(ahead: dict[str, list[str]], plan: ShardingPlan) -> dict[str, list[str]]:
    """Let units inside a module that is recomputed in the older way ask for nothing, and the one around them ask
    instead: their forward pass runs a second time in backward, where what follows has been freed for good.
    """
    found: dict[str, list[str]] = {}
    for path, others in ahead.items():
        repeated = any(path != module and is_inside(path, module) for module in plan.recompute)
        around = path
        while repeated and (around not in found or around == path):
            around = around.rpartition(".")[0]
        asked = found.setdefault(around, [])
        asked += [other for other in others if other not in asked]
        if repeated:
            found[path] = []
    return found


def _fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module
