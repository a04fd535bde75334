"""Schedulers of diffusers as `diffusion` components for generation, under their class names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from mm_core.models.protocols import Denoiser, Generators, Guidance, Progress
from mm_core.models.sampling import classifier_free_guidance
from mm_registry.errors import UserError


class DiffusersScheduler:
    """A diffusers scheduler behind `sample`. It noises nothing and has no loss: training needs a component
    that does.

    Args:
        guidance_scale: classifier-free guidance, one number or one for each of two experts.
        num_inference_steps: number of denoising steps.
        fields: arguments of the diffusers class; None is the class's own default.

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
        self._arguments = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            **fields,
        }
        try:
            self.scheduler: Any = self.scheduler_class(**{k: v for k, v in fields.items() if v is not None})
        except (ValueError, NotImplementedError, ImportError, TypeError) as error:
            raise UserError(
                f"diffusion: {self.scheduler_class.__name__} refuses its section: {error}"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """It is pickled by its arguments: some of diffusers' schedulers hold functions, which cannot be."""
        return partial(type(self), **self._arguments), ()

    @property
    def num_train_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def sigmas(self) -> torch.Tensor:
        """The scheduler's current sigmas, descending; of one that has none, noise over signal of its training steps."""
        sigmas: torch.Tensor | None = getattr(self.scheduler, "sigmas", None)
        if sigmas is None:
            signal = self.scheduler.alphas_cumprod
            sigmas = ((1 - signal) / signal).sqrt()
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
        told = config.get("prediction_type"), config.get("use_flow_sigmas")
        if told == (None, None):  # one of those that know nothing else
            return type(self.scheduler).__name__.startswith("FlowMatch")
        return told == ("flow_prediction", True)

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
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=latents.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        extra = {}
        if generator is not None and "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = generator
        timesteps = scheduler.timesteps
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        for step, t in enumerate(timesteps):
            scale = guidance(float(t)) if callable(guidance) else guidance
            timestep = t.expand(latents.shape[0])
            # Only some of diffusers' schedulers want their samples scaled for the model.
            seen = (
                scheduler.scale_model_input(latents, t)
                if hasattr(scheduler, "scale_model_input")
                else latents
            )
            output = classifier_free_guidance(model, seen, timestep, model_kwargs, uncond_kwargs, scale)
            latents = scheduler.step(output, t, latents, return_dict=False, **extra)[0]
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


class FlowMatchHeunDiscrete(DiffusersScheduler):
    """Heun's steps of a flow; each predicts twice."""

    scheduler_class = FlowMatchHeunDiscreteScheduler


class FlowMatchLCM(DiffusersScheduler):
    """Few steps of a distilled flow, each to a clean sample with fresh noise (Luo et al., 2023)."""

    scheduler_class = FlowMatchLCMScheduler


class DPMSolverMultistep(DiffusersScheduler):
    """DPM-Solver++ (Lu et al., 2022), with earlier steps in place of further predictions; for flows as UniPC."""

    scheduler_class = DPMSolverMultistepScheduler


class DPMSolverSinglestep(DiffusersScheduler):
    """DPM-Solver++ (Lu et al., 2022), each step by itself; for flows as UniPC."""

    scheduler_class = DPMSolverSinglestepScheduler


class DEISMultistep(DiffusersScheduler):
    """DEIS (Zhang & Chen, 2022); for flows as UniPC."""

    scheduler_class = DEISMultistepScheduler


class SASolver(DiffusersScheduler):
    """SA-Solver (Xue et al., 2023), which adds fresh noise; for flows as UniPC."""

    scheduler_class = SASolverScheduler


class DDIM(DiffusersScheduler):
    """DDIM (Song et al., 2020)."""

    scheduler_class = DDIMScheduler


class DDPM(DiffusersScheduler):
    """DDPM (Ho et al., 2020)."""

    scheduler_class = DDPMScheduler


class EulerDiscrete(DiffusersScheduler):
    """Euler's steps (Karras et al., 2022)."""

    scheduler_class = EulerDiscreteScheduler


class EulerAncestralDiscrete(DiffusersScheduler):
    """Euler's steps with fresh noise."""

    scheduler_class = EulerAncestralDiscreteScheduler


class HeunDiscrete(DiffusersScheduler):
    """Heun's steps (Karras et al., 2022); each predicts twice."""

    scheduler_class = HeunDiscreteScheduler
