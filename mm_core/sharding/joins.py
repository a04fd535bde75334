"""Tensors that are made to depend on a scalar, wherever they are in the arguments or the output of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


class _Join(torch.autograd.Function):
    """Tensors as they are, made to depend on a scalar by a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, scalar: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.device = scalar.device
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return torch.zeros((), device=ctx.device), *grads


def join(scalar: torch.Tensor, value: Any) -> tuple[Any, bool]:
    """Let tensors somewhere in `value` depend on a scalar: all that have a gradient, else the first one that
    could have one.

    Returns:
        The value anew, and whether there was such a tensor.
    """
    leaves, shape = tree_flatten(value)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not places:
        floats = (
            i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        )
        places = list(floats)[:1]
    if not places or not scalar.requires_grad:
        return value, False
    for place, tensor in zip(places, _Join.apply(scalar, *(leaves[i] for i in places)), strict=True):
        leaves[place] = tensor
    return tree_unflatten(leaves, shape), True


def first_with_gradient(args: Any, kwargs: Any) -> torch.Tensor | None:
    """The first tensor among the arguments of a call that has a gradient; those at the top come first."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return value
    leaves = tree_flatten((args, kwargs))[0]
    return next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad), None)


def has_gradient(args: Any, kwargs: Any) -> bool:
    """Whether any tensor among the arguments of a call has one."""
    return first_with_gradient(args, kwargs) is not None
