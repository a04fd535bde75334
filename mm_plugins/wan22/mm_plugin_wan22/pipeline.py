"""From prompts, and images, to videos with Wan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mm_core.generation.text_to_video import TextToVideoPipeline
from mm_core.models.protocols import Denoiser, Guidance, Tokenizer
from mm_core.models.sora import SoRAModel
from mm_plugin_wan22.i2v_processors import WanI2VProcessor, WanTI2VProcessor
from mm_plugin_wan22.variants import CONCATENATED, IMAGE_EMBEDDED, taken
from mm_registry.errors import UserError

#: What Wan's own code and MindSpeed-MM's pipeline guide away from if nothing is said (`sample_neg_prompt` of Wan2.2).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)


class WanPipeline(TextToVideoPipeline):
    """Text, or text and given frames, to video with one expert, or with Wan2.2's two: one for high noise, one for low.

    What makes the conditions of given frames is the model's `i2v_processor`; without one it follows from the type of the
    predictor, as in MindSpeed-MM's inference files, which have no section for it.

    Args:
        model: predictor (and low-noise predictor), autoencoder, text encoder and diffusion, with weights.
        tokenizer, input_size, cpu_offload, seed, device: as the base class has them; with offloading, one expert is on
            the device at a time.
        negative_prompt: what guidance moves away from; None: `NEGATIVE_PROMPT`, "" is nothing.
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
            negative_prompt=NEGATIVE_PROMPT if negative_prompt is None else negative_prompt,
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
        channels, latent = model.predictor.config.out_channels, model.ae.latent_channels
        if channels != latent:
            raise UserError(
                f"WanPipeline: predictor.out_dim is {channels}, but the autoencoder's latents have {latent} channels"
            )

    @property
    def needs_first_frame(self) -> bool:
        """Whether the predictor's type reads given frames beside the noised ones."""
        return self.model.predictor.model_type in CONCATENATED

    def image_processor(self) -> Any:
        """The model's `i2v_processor`, or the one that the predictor's type asks for.

        Raises:
            UserError: it is a type of text alone, or one that reads features of CLIP, whose encoder only a section names.
        """
        kind = self.model.predictor.model_type
        if self.model.i2v_processor is not None or not taken(kind):
            return super().image_processor()
        if kind in IMAGE_EMBEDDED:
            raise UserError(
                f"WanPipeline: a model of type {kind} reads CLIP's features of the given frames; give ae.i2v_processor "
                '{"processor_id": "wan_i2v_processor", "image_encoder": FOLDER}'
            )
        return WanI2VProcessor() if kind in CONCATENATED else WanTI2VProcessor()

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
