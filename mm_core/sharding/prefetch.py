"""Gathering units ahead of their turn, in the order of execution."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from mm_core.sharding.plan import ShardingPlan


def set_prefetch(root: nn.Module, units: list[nn.Module], plan: ShardingPlan) -> None:
    """Ask for the next units in the order of execution.

    Without a number FSDP2's own choice stays: one ahead in backward.
    """
    order = [root, *units]
    for i, module in enumerate(order):
        assert isinstance(module, FSDPModule)
        if plan.forward_prefetch:
            module.set_modules_to_forward_prefetch(_fsdp(order[i + 1 : i + 1 + plan.forward_prefetch]))
        if plan.backward_prefetch and i > 0:
            # The root was gathered first and stays so; only units are fetched on the way back.
            earlier = order[max(1, i - plan.backward_prefetch) : i]
            module.set_modules_to_backward_prefetch(_fsdp(earlier[::-1]))


def _fsdp(modules: list[nn.Module]) -> list[FSDPModule]:
    return [module for module in modules if isinstance(module, FSDPModule)]
