"""Schedulers of diffusers as `diffusion` components for generation, under their class names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from mm_core.models.protocols import Denoiser, Generators, Guidance, Progress
from mm_core.models.sampling import classifier_free_guidance
from mm_registry.errors import UserError


class DiffusersScheduler:
    """A diffusers scheduler behind `sample`. It noises nothing and has no loss: training needs a component
    that does.

    Args:
        guidance_scale: classifier-free guidance, one number or one for each of two experts.
        num_inference_steps: number of denoising steps.
        fields: arguments of the diffusers class.

    Attributes:
        scheduler: the diffusers object.
        is_flow: whether it integrates the velocity of flow matching.

    Raises:
        UserError: diffusers refuses the arguments.
    """

    scheduler_class: ClassVar[type]

    def __init__(
        self,
        *,
        guidance_scale: float | Sequence[float] = 0.0,
        num_inference_steps: int | None = None,
        **fields: Any,
    ) -> None:
        self.guidance_scale = guidance_scale
        self.num_inference_steps = num_inference_steps
        try:
            self.scheduler = self.scheduler_class(**fields)
        except (ValueError, NotImplementedError, ImportError, TypeError) as error:
            raise UserError(
                f"diffusion: {self.scheduler_class.__name__} refuses its section: {error}"
            ) from error

    @property
    def num_train_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def sigmas(self) -> torch.Tensor:
        """The scheduler's current sigmas, descending."""
        sigmas: torch.Tensor = self.scheduler.sigmas
        # Until set_timesteps() some of diffusers' schedulers hold them in the order of training.
        return sigmas.flip(0) if sigmas[0] < sigmas[-1] else sigmas

    @property
    def timesteps(self) -> torch.Tensor:
        """The scheduler's current timesteps, descending."""
        timesteps: torch.Tensor = self.scheduler.timesteps
        return timesteps

    @property
    def is_flow(self) -> bool:
        config = self.scheduler.config
        return bool(config.get("prediction_type", "flow_prediction") == "flow_prediction") and bool(
            config.get("use_flow_sigmas", True)
        )

    def q_sample(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to train.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"diffusion: {self.scheduler_class.__name__} only generates; "
            "to train, choose a diffusion.model_id that noises latents (`mm list` shows them)"
        )

    training_losses = q_sample

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
        """Denoise `[B, C, T, H, W]` with the scheduler's steps; see
        `mm_core.models.protocols.Diffusion.sample`.

        Returns:
            latents, at least fp32.

        Raises:
            UserError: no number of steps is given.
        """
        steps = steps or self.num_inference_steps
        if not steps:
            raise UserError(
                "diffusion: generation needs num_inference_steps (the number of denoising steps), for "
                "example 50"
            )
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        self.scheduler.set_timesteps(steps, device=latents.device)
        self.scheduler.set_begin_index(0)
        extra = {}
        if generator is not None and "generator" in inspect.signature(self.scheduler.step).parameters:
            extra["generator"] = generator
        timesteps = self.scheduler.timesteps
        for step, t in enumerate(timesteps):
            scale = guidance(float(t)) if callable(guidance) else guidance
            timestep = t.expand(latents.shape[0])
            output = classifier_free_guidance(model, latents, timestep, model_kwargs, uncond_kwargs, scale)
            latents = self.scheduler.step(output, t, latents, return_dict=False, **extra)[0]
            if progress is not None:
                progress(step + 1, len(timesteps))
        return latents


class UniPCMultistep(DiffusersScheduler):
    """UniPC (Zhao et al., 2023), the sampler of published Wan results; for flow matching give
    `prediction_type: flow_prediction`, `use_flow_sigmas: true` and `flow_shift`.
    """

    scheduler_class = UniPCMultistepScheduler


class FlowMatchEulerDiscrete(DiffusersScheduler):
    """Euler steps of a flow on diffusers' grid (Esser et al., 2024)."""

    scheduler_class = FlowMatchEulerDiscreteScheduler
