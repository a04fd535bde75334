"""Rectified flow, as most video models train and sample it: what their schedulers share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mm_core.models.protocols import Denoiser, Generators, Guidance, Progress
from mm_core.models.sampling import classifier_free_guidance
from mm_registry.errors import UserError


class RectifiedFlow:
    """`x_t = (1 - sigma) x_0 + sigma noise`, and the model predicts the velocity `noise - x_0` (Liu et al.,
    2022; Lipman et al., 2022). Timesteps are `sigma * num_train_timesteps`.

    A base class for schedulers: a subclass sets the attributes below, says which timesteps training draws
    (`draw_timesteps`) and at which sigmas a video is denoised (`inference_sigmas`), and may weigh the loss
    (`training_weight`). It then is a `mm_core.models.protocols.Diffusion`.

    Attributes:
        sigmas: `[num_train_timesteps]` fp32, descending.
        timesteps: `[num_train_timesteps]` fp32, descending.
        num_train_timesteps: the timestep value of pure noise.
        num_inference_timesteps: denoising steps where a call names none; None if every call has to.
        guidance_scale: classifier-free guidance, one number or one for each of two experts.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    num_train_timesteps: int
    num_inference_timesteps: int | None
    guidance_scale: float | Sequence[float]

    def draw_timesteps(
        self, latents: torch.Tensor, generators: Sequence[torch.Generator | None]
    ) -> torch.Tensor:
        """Draw a timestep value for each sample: `[B]` on the CPU, from its own generator.

        Args:
            latents: the clean ones `[B, C, T, H, W]`, for their sizes.
        """
        raise NotImplementedError

    def inference_sigmas(self, steps: int, latents: torch.Tensor) -> torch.Tensor:
        """Return the sigmas at which a video is denoised: `[steps]` float64, descending; 0 comes after.

        Args:
            latents: noise `[B, C, T, H, W]`, for its sizes.
        """
        raise NotImplementedError

    def training_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of the loss at timestep values `[B]` -> `[B]` in their dtype; 1 everywhere by default."""
        return torch.ones_like(t)

    def q_sample(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        generator: Generators | None = None,
        *,
        first_frame_latents: torch.Tensor | None = None,
        **conditions: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise latents `[B, C, T, H, W]`, each sample to a timestep of its own.

        A given first frame stands in place of its noise: the noised latents begin with it at each timestep, and there is
        no velocity to predict.

        Args:
            latents: clean latents, normalised.
            noise: as latents; drawn if None.
            t: timestep values `[B]`, also between grid points and outside the trained range; drawn from the
                trained range if None.
            generator: one for all, or one a sample. Timesteps are drawn first, then noise.
            first_frame_latents: `[B, C, 1, H, W]`, if the network is given the first frame.
            conditions: others are ignored here.

        Returns:
            noised latents and noise (with the given frame), as latents but at least fp32, and timesteps `[B]` fp32.
        """
        B = latents.shape[0]
        clean = latents.to(torch.promote_types(latents.dtype, torch.float32))
        generators = per_sample(generator, B)
        if t is None:
            t = self.draw_timesteps(clean, generators)
        elif t.shape != (B,):
            raise ValueError(f"t has shape {tuple(t.shape)}, but {B} samples need [{B}]")
        if noise is None:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        t = t.to(torch.float32).to(latents.device)  # in this order: NPUs have no float64
        noise = noise.to(clean)
        if first_frame_latents is not None:
            noise = torch.cat([first_frame_latents.to(clean), noise[:, :, 1:]], dim=2)
        sigma = (t.to(clean.dtype) / self.num_train_timesteps).view(-1, *[1] * (latents.ndim - 1))
        return (1 - sigma) * clean + sigma * noise, noise, t

    def training_losses(
        self,
        model_output: torch.Tensor,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        **conditions: Any,
    ) -> torch.Tensor:
        """Weighted mean squared error of the velocity, `[B]`, in fp32 (float64 for float64 outputs).

        Args:
            model_output: predicted velocity `[B, C, T, H, W]`.
            x_start, noise: what `q_sample` was given and returned; x_t is not needed.
            t: timestep values `[B]`.
        """
        dtype = torch.promote_types(model_output.dtype, torch.float32)
        target = noise.to(dtype) - x_start.to(dtype)
        error = (model_output.to(dtype) - target).square().flatten(1).mean(1)  # [B]
        # Not in float64 as such: NPUs have none.
        return error * self.training_weight(t.to(dtype))

    def sample(
        self,
        model: Denoiser,
        latents: torch.Tensor,
        model_kwargs: Mapping[str, Any],
        *,
        uncond_kwargs: Mapping[str, Any] | None = None,
        guidance: Guidance | None = None,
        steps: int | None = None,
        generator: Generators | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Integrate the flow from noise to video with Euler steps; the last step ends at sigma 0.

        Args:
            model: `model(latents, timestep [B], **kwargs) -> velocity`.
            latents: noise `[B, C, T, H, W]`.
            model_kwargs, uncond_kwargs: conditions, and those of the unconditional prediction.
            guidance: classifier-free guidance scale, or a function of the timestep; None or at most 1 is
                without guidance.
            steps: number of steps; None takes `num_inference_timesteps`.
            generator: not used, the flow is deterministic.
            progress: called with (steps done, steps).

        Returns:
            latents as given, at least fp32.

        Raises:
            UserError: no number of steps is given.
        """
        steps = steps or self.num_inference_timesteps
        if not steps:
            raise UserError(
                "diffusion: generation needs num_inference_timesteps (the number of denoising steps), "
                "for example 50"
            )
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        sigmas = [*self.inference_sigmas(steps, latents).tolist(), 0.0]
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            t = sigma * self.num_train_timesteps
            timestep = torch.full((latents.shape[0],), t, dtype=torch.float32, device=latents.device)
            scale = guidance(t) if callable(guidance) else guidance
            velocity = classifier_free_guidance(model, latents, timestep, model_kwargs, uncond_kwargs, scale)
            latents = latents + (following - sigma) * velocity
            if progress is not None:
                progress(step + 1, steps)
        return latents


def per_sample(generator: Generators | None, count: int) -> Sequence[torch.Generator | None]:
    """Return one generator for each of `count` samples; a single one (or None) serves all."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} samples")
    return generator
