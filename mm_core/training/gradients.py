"""Scaling and clipping of gradients in one pass.

Tasks give sums, not means, so gradients are divided by the weight of the whole global batch once a step. That
division and the clipping are one multiplication, and nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def scale_and_clip(
    parameters: Iterable[torch.nn.Parameter], scale: torch.Tensor, max_norm: float
) -> torch.Tensor:
    """Multiply all gradients by `scale`, then clip their global 2-norm to `max_norm`; in place.

    Args:
        parameters: the trained parameters, sharded (DTensor) or not; those without a gradient are left out.
        scale: 0-d fp32 tensor on the gradients' device.
        max_norm: the limit; 0 turns clipping off.

    Returns:
        The norm of the scaled gradients before clipping, 0-d fp32, the same on every rank.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), device=scale.device)
    norm = _total_norm(grads).to(scale.device) * scale
    factor = scale
    if max_norm > 0:
        factor = scale * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for grad in grads:
        own = grad.to_local() if isinstance(grad, DTensor) else grad
        by_device.setdefault(own.device, []).append(own)
    for device, own_grads in by_device.items():
        # Offloaded gradients lie on the CPU, and a kernel over a list takes no scalar of another device.
        torch._foreach_mul_(own_grads, factor.to(device))
    return norm


def _total_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all of them as one vector, 0-d fp32, the same on every rank.

    Experts live on another mesh than the rest, and unsharded parameters on none: torch takes no mixed lists.
    """
    norms = [torch.nn.utils.get_total_norm(part) for part in by_mesh(grads, grads)]
    whole = [(norm.full_tensor() if isinstance(norm, DTensor) else norm).float() for norm in norms]
    if len(whole) == 1:
        return whole[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(whole[0].device) for norm in whole]))


def by_mesh(items: Sequence[T], tensors: Sequence[torch.Tensor]) -> list[list[T]]:
    """Items in groups whose tensors share a device mesh; those of plain tensors are a group too."""
    groups: dict[Any, list[T]] = {}
    for item, tensor in zip(items, tensors, strict=True):
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(item)
    return list(groups.values())
