"""Wan's flow matching: the sigma grid, training noise, the training weight and Euler sampling."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from mm_core.models.protocols import Denoiser, Generators, Guidance, Progress
from mm_core.models.sampling import classifier_free_guidance
from mm_registry.errors import UserError

logger = logging.getLogger(__name__)


class WanFlowMatchScheduler:
    """Rectified flow (Liu et al., 2022; Lipman et al., 2022) on a shifted grid (Esser et al., 2024), as Wan
    trains it.

    `x_t = (1 - sigma) x_0 + sigma noise` and the model predicts `noise - x_0`. The grid is
    `linspace(sigma_max, sigma_min, N)`, of N + 1 points without the last when `extra_one_step`, then `sigma'
    = shift sigma / (1 + (shift - 1) sigma)`; timesteps are `sigma' * num_train_timesteps`. It descends, so
    index 0 is the highest noise. It is computed in float64 and kept in fp32.

    Which timesteps are trained is said in one of two forms:

    - `boundary` with `expert`: the sigma at which Wan2.2 hands over from the high-noise to the low-noise
      expert (0.875 for text to video), and which of the two this is. The index range follows from the grid's
      own shift.
    - `min_timestep_boundary`, `max_timestep_boundary`: fractions of the index (0 is the highest noise), as
      MindSpeed-MM has them. The sigma that they mean holds for this shift only; `describe()` tells it.

    Attributes:
        sigmas: `[num_train_timesteps]` fp32, descending.
        timesteps: `[num_train_timesteps]` fp32, descending.
        index_range: first and one past the last grid index that training draws.

    Raises:
        UserError: an empty or contradictory range of timesteps.
    """

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        num_inference_timesteps: int | None = None,
        shift: float = 3.0,
        sigma_max: float = 1.0,
        sigma_min: float = 0.003 / 1.002,
        extra_one_step: bool = False,
        guidance_scale: float | Sequence[float] = 0.0,
        min_timestep_boundary: float = 0.0,
        max_timestep_boundary: float = 1.0,
        boundary: float | None = None,
        expert: Literal["high", "low"] | None = None,
        inverse_timesteps: bool = False,
        reverse_sigmas: bool = False,
    ) -> None:
        if inverse_timesteps or reverse_sigmas:
            raise UserError("wan_flow_match_scheduler: inverse_timesteps and reverse_sigmas are not offered")
        self.num_train_timesteps = num_train_timesteps
        self.num_inference_timesteps = num_inference_timesteps
        self.shift = shift
        self.sigma_max = sigma_max
        self.sigma_min = sigma_min
        self.extra_one_step = extra_one_step
        self.guidance_scale = guidance_scale

        grid = self._grid(num_train_timesteps)  # [N] float64
        self.sigmas = grid.float()
        self.timesteps = (grid * num_train_timesteps).float()
        bell = self._bell(grid * num_train_timesteps)
        self._weight_floor = float(bell.min())
        self._weight_scale = num_train_timesteps / float((bell - bell.min()).sum())
        self.index_range = self._index_range(
            grid, min_timestep_boundary, max_timestep_boundary, boundary, expert
        )
        logger.info("%s", self.describe())

    def _grid(self, steps: int) -> torch.Tensor:
        """Shifted sigmas `[steps]` in float64, descending."""
        points = steps + 1 if self.extra_one_step else steps
        sigmas = torch.linspace(self.sigma_max, self.sigma_min, points, dtype=torch.float64)[:steps]
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def _bell(self, t: torch.Tensor) -> torch.Tensor:
        n = self.num_train_timesteps
        return torch.exp(-2 * ((t - n / 2) / n) ** 2)

    def _index_range(
        self, grid: torch.Tensor, low: float, high: float, boundary: float | None, expert: str | None
    ) -> tuple[int, int]:
        count = len(grid)
        if (boundary is None) != (expert is None):
            raise UserError(
                "wan_flow_match_scheduler: give boundary (a sigma) and expert ('high' or 'low') together"
            )
        if boundary is not None:
            if (low, high) != (0.0, 1.0):
                raise UserError(
                    "wan_flow_match_scheduler: boundary and min/max_timestep_boundary both say which "
                    "timesteps are trained; keep one"
                )
            if expert not in ("high", "low"):
                raise UserError(f"wan_flow_match_scheduler: expert is 'high' or 'low', not {expert!r}")
            # >= as in generation, where the high-noise expert takes t >= boundary * num_train_timesteps
            hand_over = int((grid >= boundary).sum())
            start, stop = (0, hand_over) if expert == "high" else (hand_over, count)
        else:
            if not 0.0 <= low < high <= 1.0:
                raise UserError(
                    f"wan_flow_match_scheduler: need 0 <= min_timestep_boundary ({low}) < "
                    f"max_timestep_boundary ({high}) <= 1"
                )
            start, stop = int(low * count), int(high * count)
        if start >= stop:
            raise UserError(
                f"wan_flow_match_scheduler: no timestep of the {count} is left to train between index "
                f"{start} and {stop}"
            )
        return start, stop

    def describe(self) -> str:
        """One line: which timesteps are trained, and the sigmas that they mean."""
        start, stop = self.index_range
        first, last = float(self.sigmas[start]), float(self.sigmas[stop - 1])
        edge = f", handing over at sigma {float(self.sigmas[stop]):.4f}" if stop < len(self.sigmas) else ""
        return (
            f"flow matching trains {stop - start} of {len(self.sigmas)} timesteps, index {start} to "
            f"{stop - 1}: "
            f"sigma {first:.4f} to {last:.4f} at shift {self.shift:g}{edge}"
        )

    def training_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of timestep values `[B]` -> `[B]` in their dtype: a bell around the middle, its mean over
        the grid 1, its least 0.
        """
        return (self._bell(t) - self._weight_floor) * self._weight_scale

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
            t: timestep values `[B]`, also between grid points and outside the trained range; drawn from the
                trained range if None.
            generator: one for all, or one a sample. Timesteps are drawn first, then noise.
            conditions: ignored here.

        Returns:
            noised latents and noise, as latents but at least fp32, and timesteps `[B]` fp32.
        """
        B = latents.shape[0]
        clean = latents.to(torch.promote_types(latents.dtype, torch.float32))
        generators = _per_sample(generator, B)
        if t is None:
            start, stop = self.index_range
            index = torch.cat([torch.randint(start, stop, (1,), generator=g) for g in generators])  # [B]
            t = self.timesteps[index]
        elif t.shape != (B,):
            raise ValueError(f"t has shape {tuple(t.shape)}, but {B} samples need [{B}]")
        if noise is None:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        t = t.to(latents.device, torch.float32)
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
        sigmas = torch.cat([self._grid(steps), torch.zeros(1, dtype=torch.float64)]).tolist()
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            t = sigma * self.num_train_timesteps
            timestep = torch.full((latents.shape[0],), t, dtype=torch.float32, device=latents.device)
            scale = guidance(t) if callable(guidance) else guidance
            velocity = classifier_free_guidance(model, latents, timestep, model_kwargs, uncond_kwargs, scale)
            latents = latents + (following - sigma) * velocity
            if progress is not None:
                progress(step + 1, steps)
        return latents


def _per_sample(generator: Generators | None, count: int) -> Sequence[torch.Generator | None]:
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} samples")
    return generator
