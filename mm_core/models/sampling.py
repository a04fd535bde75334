"""What samplers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mm_core.models.protocols import Denoiser


def classifier_free_guidance(
    model: Denoiser,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    model_kwargs: Mapping[str, Any],
    uncond_kwargs: Mapping[str, Any] | None,
    scale: float | None,
) -> torch.Tensor:
    """Predict with classifier-free guidance (Ho & Salimans, 2022): `uncond + scale * (cond - uncond)`.

    Args:
        latents: `[B, C, T, H, W]`.
        timestep: `[B]`.
        scale: None or at most 1 asks for no guidance; then the unconditional prediction is not computed.

    Returns:
        `[B, C, T, H, W]` in the latents' dtype: a half-precision model does not make the integration half
        precision.
    """
    conditional = model(latents, timestep, **model_kwargs).to(latents.dtype)
    if scale is None or scale <= 1.0:
        return conditional
    if uncond_kwargs is None:
        raise ValueError(f"guidance {scale} needs the conditions of the unconditional prediction")
    unconditional = model(latents, timestep, **uncond_kwargs).to(latents.dtype)
    return unconditional + scale * (conditional - unconditional)
