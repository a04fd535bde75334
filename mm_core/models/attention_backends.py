"""Which attention kernels a network of diffusers is computed with: one for the device, tried out before it is used.

diffusers' attention goes through a dispatcher with named backends. `native`, torch's `scaled_dot_product_attention`, is the eager
twin of all of them, and what is used wherever another one is missing, fails, or differs from it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mm_core.accelerator import dtype_name, own_attention
from mm_core.models.kernels import Computation
from mm_registry.errors import UserError
from mm_registry.words import described

log = logging.getLogger(__name__)

KEY = "attention_backend"
"""The key of a section that asks for one."""
NATIVE = "native"
_HALF = (torch.bfloat16, torch.float16)
_OF_DEVICE = {"cudnn": "_native_cudnn", "fused": "_native_npu"}
_TOLERANCE = 3e-2  # relative, of half precision against fp32
_TOKENS, _HEADS = 64, 2


def set_attention_backend(network: nn.Module, asked: str | None, where: Computation, what: str) -> str | None:
    """Let the attentions of a network of diffusers use one backend, and log which.

    Without a wish: in half precision the device's own kernels (cuDNN's on GPUs from Hopper on, the fused one of an NPU), if they
    compute what `native` does, forward and backward; `native` otherwise. cuDNN's backward pass is not deterministic, so it is not
    chosen where torch is told to be.

    Args:
        asked: diffusers' name of a backend, or None.
        where: it is going to compute.
        what: it is called, for messages.

    Returns:
        The backend's name; None for a network whose attentions do not choose one.

    Raises:
        UserError: the backend that is asked for does not work here, and why.
    """
    attentions: list[Any] = [
        # The root's own method would choose for the whole process.
        module
        for module in network.modules()
        if module is not network and callable(getattr(module, "set_attention_backend", None))
    ]
    if not attentions:
        if asked is not None:
            raise UserError(
                f"{what}: {KEY} is {asked}, but no attention of {type(network).__name__} chooses one; remove the key"
            )
        return None
    width = _head_width(attentions[0])
    chosen, remark = NATIVE, ""
    if asked is not None:
        problem = None if asked == NATIVE else _problem(asked, where, width)
        if problem is not None:
            raise UserError(
                f"{what}: {KEY} {asked} does not work on {where} with heads of {width} channels ({problem}); write "
                f"{NATIVE}, or remove the key"
            )
        chosen, remark = asked, ", as the file asks"
    elif (own := _own(where)) is not None:
        problem = _problem(own, where, width)
        if problem is None:
            chosen = own
        else:
            remark = f", because {own} does not work there ({problem})"
    for attention in attentions:
        attention.set_attention_backend(chosen)
    log.info("%s: attention on %s is %s%s", what, where, chosen, remark)
    return chosen


def _own(where: Computation) -> str | None:
    """The backend of the device's own kernels, if there is one for this."""
    own = own_attention(where.device)
    if own is None or where.dtype not in _HALF:
        return None
    if own == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return None
    # Ranks that share a sequence exchange in torch's function, which an NPU's kernels are called without.
    return None if own == "fused" and where.shares_sequences else _OF_DEVICE[own]


def _head_width(attention: Any) -> int:
    width, heads = getattr(attention, "inner_dim", None), getattr(attention, "heads", None)
    return width // heads if isinstance(width, int) and isinstance(heads, int) else 64


def _problem(backend: str, where: Computation, width: int) -> str | None:
    """Why a backend cannot be used: it raises, computes no gradient, or something else than `native` does."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    device, dtype = where.device, where.dtype or torch.float32
    generator = torch.Generator().manual_seed(0)  # the run's own generators stay as they are

    def draw() -> torch.Tensor:  # [B, S, H, D], as diffusers' attentions call the dispatcher
        return torch.randn(1, _TOKENS, _HEADS, width, generator=generator).to(device, dtype)

    given, outcome = [draw() for _ in range(3)], draw().float()
    twins = [one.float().requires_grad_(where.gradients) for one in given]
    exact = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in twins)).transpose(1, 2)
    found, wanted = [], [exact]
    try:
        inputs = [one.requires_grad_(where.gradients) for one in given]
        output = dispatch_attention_fn(*inputs, backend=AttentionBackendName(backend))
        found = [output]
        if where.gradients:
            if not output.requires_grad:
                return "it computes no gradients"
            found += torch.autograd.grad((output.float() * outcome).sum(), inputs)
            wanted += torch.autograd.grad((exact * outcome).sum(), twins)
    except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
        return described(error)
    with torch.no_grad():
        distance = max(
            float((mine.float() - twin).norm() / twin.norm())
            for mine, twin in zip(found, wanted, strict=True)
        )
    if not distance <= _TOLERANCE:  # NaN is no number below
        return f"in {dtype_name(dtype)} it differs from {NATIVE} by {distance:.1%}"
    return None
