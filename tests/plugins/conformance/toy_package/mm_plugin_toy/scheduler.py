"""Rectified flow on a straight grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mm_core.models.sampling import classifier_free_guidance
from mm_registry.errors import UserError


class ToyFlow:
    """`x_t = (1 - sigma) x_0 + sigma noise`; the model predicts `noise - x_0`."""

    def __init__(self, *, num_train_timesteps: int = 100, guidance_scale: float = 1.0) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.guidance_scale = guidance_scale
        self.sigmas = torch.linspace(1, 1 / num_train_timesteps, num_train_timesteps, device="cpu")
        self.timesteps = self.sigmas * num_train_timesteps

    def q_sample(
        self,
        latents: torch.Tensor,
        noise: Any = None,
        t: Any = None,
        generator: Any = None,
        **conditions: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        B = len(latents)
        keys = list(generator) if isinstance(generator, Sequence) else [generator] * B
        if t is None:
            t = self.timesteps[
                torch.cat([torch.randint(len(self.sigmas), (1,), generator=key) for key in keys])
            ]
        if noise is None:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=key) for key in keys])
        sigma = (t / self.num_train_timesteps).view(-1, 1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, noise, t

    def training_losses(
        self,
        model_output: torch.Tensor,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        **conditions: Any,
    ) -> torch.Tensor:
        return (model_output.float() - (noise - x_start).float()).square().flatten(1).mean(1)

    def sample(
        self,
        model: Any,
        latents: torch.Tensor,
        model_kwargs: Any,
        *,
        uncond_kwargs: Any = None,
        guidance: Any = None,
        steps: int | None = None,
        generator: Any = None,
        progress: Any = None,
    ) -> torch.Tensor:
        if not steps:
            raise UserError("toy_flow: give the number of steps")
        sigmas = torch.linspace(1, 0, steps + 1).tolist()
        for step in range(steps):
            t = sigmas[step] * self.num_train_timesteps
            timestep = torch.full((len(latents),), t)
            scale = guidance(t) if callable(guidance) else guidance
            velocity = classifier_free_guidance(model, latents, timestep, model_kwargs, uncond_kwargs, scale)
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
            if progress is not None:
                progress(step + 1, steps)
        return latents
