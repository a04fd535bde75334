"""Scaling and clipping of gradients in one pass.

Tasks give sums, not means, so gradients are divided by the weight of the whole global batch once a step. That
division and the clipping are one multiplication, and nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@torch.no_grad()  # in which the local part of a DTensor costs nothing
def scale_and_clip(
    parameters: Iterable[torch.nn.Parameter],
    scale: torch.Tensor,
    max_norm: float,
    stages: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Multiply all gradients by `scale`, then clip their global 2-norm to `max_norm`; in place.

    Args:
        parameters: the trained parameters, sharded (DTensor) or not; those without a gradient are left out.
        scale: 0-d fp32 tensor on the gradients' device.
        max_norm: the limit; 0 turns clipping off.
        stages: ranks that hold the other stages of the same model; each of them calls this.

    Returns:
        The norm of the scaled gradients before clipping, 0-d fp32, the same on every rank.
    """
    parameters = list(parameters)
    return scale_by(parameters, total_norm(parameters, scale.device, stages), scale, max_norm)


@torch.no_grad()
def total_norm(
    parameters: Iterable[torch.nn.Parameter],
    device: torch.device,
    stages: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The 2-norm of all gradients, 0-d fp32 on `device`, the same on every rank; see `scale_and_clip`."""
    grads = [p.grad for p in parameters if p.grad is not None]
    square = _total_square(grads, _local(grads), device)
    if stages is not None:
        dist.all_reduce(square, group=stages)
    return square.sqrt()


@torch.no_grad()
def scale_by(
    parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor, scale: torch.Tensor, max_norm: float
) -> torch.Tensor:
    """Multiply all gradients, whose norm is known, by `scale`, and clip them; nothing is exchanged.

    Args:
        norm: of the gradients as they are, 0-d.

    Returns:
        The norm of the scaled gradients before clipping.
    """
    norm = norm * scale
    factor = scale
    if max_norm > 0:
        factor = scale * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for part in _local([p.grad for p in parameters if p.grad is not None]):
        by_device.setdefault(part.device, []).append(part)
    for device, own_grads in by_device.items():
        # Offloaded gradients lie on the CPU, and a kernel over a list takes no scalar of another device.
        torch._foreach_mul_(own_grads, factor.to(device))
    return norm


def _local(grads: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


def _total_square(grads: list[torch.Tensor], own: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The squared 2-norm of all gradients as one vector, 0-d fp32, the same on every rank that has the same parameters.

    A tensor that several ranks hold whole, as those do that share the tensors beside it, counts once. Experts live on
    another mesh than the rest, and unsharded parameters on none: torch takes no mixed lists. It also leads each of many
    small operations through DTensor; here are one list and one number for each way to shard.

    Args:
        own: what this rank holds of each.
    """
    lists: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for grad, part in zip(grads, own, strict=True):
        place = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else (None, ())
        lists.setdefault((part.device, *place), []).append(part)
    squares: dict[tuple[dist.ProcessGroup, ...], torch.Tensor] = {}
    for (_, mesh, placements), parts in lists.items():
        groups = tuple(
            mesh.get_group(i)
            for i, placement in enumerate(placements)
            if not placement.is_replicate() and mesh.size(i) > 1
        )
        norms = torch._foreach_norm(parts, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum().to(device)
        squares[groups] = squares[groups] + square if groups in squares else square
    for groups, square in squares.items():
        for group in groups:
            dist.all_reduce(square, group=group)
    return torch.stack([torch.zeros((), device=device), *squares.values()]).sum()


def by_mesh(items: Sequence[T], tensors: Sequence[torch.Tensor]) -> list[list[T]]:
    """Items in groups whose tensors share a device mesh; those of plain tensors are a group too."""
    groups: dict[Any, list[T]] = {}
    for item, tensor in zip(items, tensors, strict=True):
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(item)
    return list(groups.values())
