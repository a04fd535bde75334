"""From prompts to videos with Wan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mm_core.generation.text_to_video import TextToVideoPipeline
from mm_core.models.protocols import Denoiser, Guidance, Tokenizer
from mm_core.models.sora import SoRAModel
from mm_registry.errors import UserError


class WanPipeline(TextToVideoPipeline):
    """Text to video with one expert, or with Wan2.2's two: one for high noise, one for low.

    Args:
        model: predictor (and low-noise predictor), autoencoder, text encoder and diffusion, with weights.
        tokenizer, input_size, negative_prompt, cpu_offload, seed, device: as the base class has them; with
            offloading, one expert is on the device at a time.
        boundary_ratio: sigma at and above which `predictor` denoises and below which `low_noise_predictor`
            does.

    Raises:
        UserError: the components do not fit together.
    """

    def __init__(
        self,
        model: SoRAModel,
        tokenizer: Tokenizer,
        *,
        input_size: Sequence[int],
        boundary_ratio: float | None = None,
        negative_prompt: str | None = None,
        cpu_offload: bool = False,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            input_size=input_size,
            negative_prompt=negative_prompt,
            cpu_offload=cpu_offload,
            seed=seed,
            device=device,
        )
        self.boundary_ratio = boundary_ratio
        self._check()

    def _check(self) -> None:
        model = self.model
        if (self.boundary_ratio is None) != (model.low_noise_predictor is None):
            have, lack = "boundary_ratio", "low_noise_predictor"
            if self.boundary_ratio is None:
                have, lack = lack, have
            raise UserError(
                f"WanPipeline: {have} is given without {lack}; two experts need both, one expert neither"
            )
        if not getattr(model.diffusion, "is_flow", True):
            raise UserError(
                "WanPipeline: Wan predicts the velocity of a flow, so diffusion needs "
                '"prediction_type": "flow_prediction" and "use_flow_sigmas": true'
            )
        channels = model.predictor.config.in_channels
        if channels != model.ae.latent_channels:
            raise UserError(
                f"WanPipeline: predictor.in_dim is {channels}, but the autoencoder's latents have "
                f"{model.ae.latent_channels} channels"
            )

    def guidance(self, scale: float | Sequence[float]) -> tuple[Guidance, bool]:
        """One scale, or those of the high-noise and the low-noise expert.

        Raises:
            UserError: another number of scales than of experts.
        """
        if self.boundary_ratio is None or isinstance(scale, int | float):
            return super().guidance(scale)
        if len(scale) != 2:
            raise UserError(
                f"WanPipeline: guidance_scale {list(scale)} does not fit the experts; this job has two, so "
                "give two numbers"
            )
        high, low = map(float, scale)
        return lambda t: high if self._is_high(t) else low, max(high, low) > 1.0

    def _is_high(self, timestep: float) -> bool:
        if self.boundary_ratio is None:
            return True
        return timestep >= self.boundary_ratio * self.model.diffusion.num_train_timesteps

    @contextmanager
    def denoiser(self) -> Iterator[Denoiser]:
        """A function that denoises with the expert of the timestep; with offloading, one expert is on the
        device at a time.
        """
        active: nn.Module | None = None

        def denoise(latents: torch.Tensor, timestep: torch.Tensor, **conditions: Any) -> torch.Tensor:
            nonlocal active
            high = self._is_high(float(timestep[0]))
            expert = self.model.predictor if high else self.model.low_noise_predictor
            if expert is not active:
                if active is not None and self.cpu_offload:
                    active.to("cpu")
                active = expert.to(self.device)
            output: torch.Tensor = expert(latents, timestep, **conditions)
            return output

        try:
            yield denoise
        finally:
            if active is not None and self.cpu_offload:
                active.to("cpu")
