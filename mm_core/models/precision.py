"""Casting a module for inference."""

from __future__ import annotations

import torch
from torch import nn


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast floating-point parameters in place, except those that the class wants in fp32; buffers keep their
    dtype.

    The exceptions are named by `_keep_in_fp32_modules`, which classes of diffusers and transformers have and
    their `from_pretrained`
    obeys: a parameter is kept if one part of its path is listed. Buffers are tables such as RoPE's, which
    half precision would ruin.
    """
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            exact = not kept.isdisjoint(name.split("."))
            parameter.data = parameter.data.to(torch.float32 if exact else dtype)
    return module
