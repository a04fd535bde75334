"""Ascend's fused operators that diffusers and transformers look for wherever torch_npu is found."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def npu_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, None]:
    """diffusers' RMSNorm calls it; the second result, the reciprocal of the root, it does not use."""
    return F.rms_norm(x, weight.shape, weight, epsilon), None


def npu_fusion_attention(*_: Any, **__: Any) -> Any:
    """transformers imports the name; only `flash_attention_2` calls it."""
    raise NotImplementedError("the pretend NPU has no fused attention; use sdpa or eager")
