"""Scaling and clipping of gradients in one pass.

Tasks give sums, not means, so gradients are divided by the weight of the whole global batch once a step. That
division and the clipping are one multiplication, and nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


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
    norm = torch.nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    # Offloaded gradients lie on the CPU, and a kernel over a list takes no scalar of another device.
    scale = scale.to(norm.device)
    norm = norm.float() * scale
    factor = scale
    if max_norm > 0:
        factor = scale * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    locals_ = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    torch._foreach_mul_(locals_, factor)
    return norm
