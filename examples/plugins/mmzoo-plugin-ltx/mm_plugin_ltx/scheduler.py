"""LTX-Video's rectified flow: more tokens, more noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mm_core.models.protocols import Denoiser, Generators, Guidance, Progress
from mm_core.models.sampling import classifier_free_guidance
from mm_registry.errors import UserError


class LTXFlowMatchScheduler:
    """Rectified flow (Liu et al., 2022) with a shift that depends on the number of tokens.

    `x_t = (1 - sigma) x_0 + sigma noise` and the model predicts `noise - x_0`; timesteps are `sigma *
    num_train_timesteps`. The shift is `mu(S)`, a straight line through `(base_seq_len, base_shift)` and
    `(max_seq_len, max_shift)`, with S the tokens of a sample: `calculate_shift` of diffusers' LTXPipeline.
    It moves a sigma to `exp(mu) / (exp(mu) + 1 / sigma - 1)`, which adds mu to its logit.

    - Training draws `sigma = sigmoid(mu + timestep_std * z)` with z standard normal: the shifted
      logit-normal distribution (Esser et al., "Scaling Rectified Flow Transformers", 2024; HaCohen et al.,
      2024). All sigmas weigh the same.
    - Sampling takes Euler steps over the shifted `linspace(1, 1 / steps, steps)`, stretched so that the last
      sigma is `shift_terminal`, then to 0: diffusers' FlowMatchEulerDiscreteScheduler with
      `use_dynamic_shifting`, as LTXPipeline calls it.

    Attributes:
        sigmas: `[num_train_timesteps]` fp32, descending, before the shift, which needs a size.
        timesteps: the same times `num_train_timesteps`.

    Raises:
        UserError: `base_seq_len` is not below `max_seq_len`.
    """

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        num_inference_timesteps: int | None = None,
        guidance_scale: float = 0.0,
        base_shift: float = 0.95,
        max_shift: float = 2.05,
        base_seq_len: int = 1024,
        max_seq_len: int = 4096,
        shift_terminal: float | None = 0.1,
        timestep_std: float = 1.0,
    ) -> None:
        if base_seq_len >= max_seq_len:
            raise UserError(
                f"ltx_flow_match: base_seq_len {base_seq_len} must be below max_seq_len {max_seq_len}"
            )
        self.num_train_timesteps = num_train_timesteps
        self.num_inference_timesteps = num_inference_timesteps
        self.guidance_scale = guidance_scale
        self.base_shift = base_shift
        self.max_shift = max_shift
        self.base_seq_len = base_seq_len
        self.max_seq_len = max_seq_len
        self.shift_terminal = shift_terminal
        self.timestep_std = timestep_std
        grid = _unshifted(num_train_timesteps)
        self.sigmas = grid.float()
        self.timesteps = (grid * num_train_timesteps).float()

    def mu(self, tokens: int) -> float:
        """The shift, as a logarithm, of samples of so many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_seq_len - self.base_seq_len)
        return self.base_shift + slope * (tokens - self.base_seq_len)

    def sampling_sigmas(self, steps: int, tokens: int) -> torch.Tensor:
        """Sigmas at which a video is denoised, `[steps]` float64, descending; the flow ends at 0 after."""
        odds = math.exp(self.mu(tokens))
        sigmas = odds / (odds + 1 / _unshifted(steps) - 1)
        if self.shift_terminal is not None and steps > 1:  # one step has no last sigma but the first
            cleared = 1 - sigmas
            sigmas = 1 - cleared * ((1 - self.shift_terminal) / cleared[-1])
        return sigmas

    def q_sample(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        generator: Generators | None = None,
        **conditions: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise latents `[B, C, T, H, W]`, each sample to a timestep of its own.

        Args:
            latents: clean latents, normalised.
            noise: as latents; drawn if None.
            t: timestep values `[B]` in `[0, num_train_timesteps]`; drawn if None.
            generator: one for all, or one a sample. Timesteps are drawn first, then noise.
            conditions: ignored here.

        Returns:
            noised latents and noise, as latents but at least fp32, and timesteps `[B]` fp32.
        """
        B = latents.shape[0]
        clean = latents.to(torch.promote_types(latents.dtype, torch.float32))
        generators = _per_sample(generator, B)
        if t is None:
            z = torch.cat([torch.randn(1, generator=g, dtype=torch.float64) for g in generators])  # [B]
            mu = self.mu(math.prod(latents.shape[2:]))
            t = torch.sigmoid(mu + self.timestep_std * z) * self.num_train_timesteps
        elif t.shape != (B,):
            raise ValueError(f"t has shape {tuple(t.shape)}, but {B} samples need [{B}]")
        if noise is None:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        t = t.to(torch.float32).to(latents.device)
        noise = noise.to(clean)
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
        """Mean squared error of the velocity, `[B]`, in fp32 (float64 for float64 outputs).

        Args:
            model_output: predicted velocity `[B, C, T, H, W]`.
            x_start, noise: what `q_sample` was given and returned; x_t and t are not needed.
        """
        dtype = torch.promote_types(model_output.dtype, torch.float32)
        target = noise.to(dtype) - x_start.to(dtype)
        return (model_output.to(dtype) - target).square().flatten(1).mean(1)

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
        """Integrate the flow from noise to video with Euler steps.

        Args:
            model: `model(latents, timestep [B], **kwargs) -> velocity`.
            latents: noise `[B, C, T, H, W]`; its T * H * W tokens decide the shift.
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
        sigmas = [*self.sampling_sigmas(steps, math.prod(latents.shape[2:])).tolist(), 0.0]
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            t = sigma * self.num_train_timesteps
            timestep = torch.full((latents.shape[0],), t, dtype=torch.float32, device=latents.device)
            scale = guidance(t) if callable(guidance) else guidance
            velocity = classifier_free_guidance(model, latents, timestep, model_kwargs, uncond_kwargs, scale)
            latents = latents + (following - sigma) * velocity
            if progress is not None:
                progress(step + 1, steps)
        return latents


def _unshifted(steps: int) -> torch.Tensor:
    return torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64, device="cpu")


def _per_sample(generator: Generators | None, count: int) -> Sequence[torch.Generator | None]:
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} samples")
    return generator
