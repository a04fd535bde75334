"""Ignored modules inside a root that computes in another dtype than they are stored in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from mm_core.sharding.plan import ShardingPlan, is_inside


def compute_in_own_dtype(modules: dict[str, nn.Module], plan: ShardingPlan) -> None:
    """Let each ignored module compute in the dtype of its parameters, and hand on what the others hand on.

    FSDP2 casts the parameters that it gathers; those that it ignores keep their dtype, and would meet activations
    in `param_dtype`.

    Args:
        modules: of the root, by their bare paths.
    """
    if plan.param_dtype is None:
        return
    for path in plan.ignored:
        stored = {p.dtype for p in modules[path].parameters() if p.is_floating_point()}
        inner = any(path != other and is_inside(path, other) for other in plan.ignored)
        if len(stored) != 1 or stored == {plan.param_dtype} or inner:
            continue
        _cast_around(modules[path], stored.pop(), plan.param_dtype)


def _cast_around(module: nn.Module, inside: torch.dtype, outside: torch.dtype) -> None:
    def cast(value: Any, dtype: torch.dtype) -> Any:
        return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)

    module.register_forward_pre_hook(
        lambda _, args, kwargs: (cast(args, inside), cast(kwargs, inside)), with_kwargs=True
    )
    module.register_forward_hook(lambda _, args, output: cast(output, outside))
