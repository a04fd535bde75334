"""From prompts to videos with Wan."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mm_core.models.protocols import Progress, Tokenizer
from mm_core.models.sora import SoRAModel
from mm_core.random import keyed_generator, keyed_normal
from mm_registry.errors import UserError

logger = logging.getLogger(__name__)


class WanPipeline:
    """Text to video: encode the prompt, draw noise, denoise with guidance, decode.

    Args:
        model: predictor (and low-noise predictor), autoencoder, text encoder and diffusion, with weights.
        tokenizer: of the text encoder.
        input_size: frames, height and width in pixels.
        boundary_ratio: sigma at and above which `predictor` denoises and below which `low_noise_predictor`
            does.
        negative_prompt: what guidance moves away from.
        cpu_offload: keep each component on the CPU while it is idle.
        seed: default seed of a call.
        device: where to compute; that of the predictor by default.

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
        self.model = model
        self.tokenizer = tokenizer
        self.boundary_ratio = boundary_ratio
        self.negative_prompt = negative_prompt or ""
        self.cpu_offload = cpu_offload
        self.seed = seed or 0
        self.device = torch.device(device or next(model.predictor.parameters()).device)
        self.frames, self.height, self.width = input_size
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

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | None = None,
        latents: torch.Tensor | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Generate one video for each prompt.

        Args:
            prompts: B texts.
            seed: with an index it keys the noise of a video, which is therefore independent of the batch.
            indices: B numbers; 0, 1, … by default.
            steps: denoising steps; the diffusion's own number by default.
            guidance_scale: one number, or those of the high-noise and the low-noise expert; the diffusion's
                by default. Above 1 each step predicts twice.
            negative_prompt: for this call.
            latents: noise `[B, C, T', h, w]` to start from instead.
            progress: called with (steps done, steps).

        Returns:
            `[B, 3, T, H, W]` fp32 in [-1, 1] on the CPU.
        """
        seed = self.seed if seed is None else seed
        indices = list(range(len(prompts)) if indices is None else indices)
        if len(indices) != len(prompts):
            raise ValueError(f"{len(indices)} indices for {len(prompts)} prompts")
        high, low = self._guidance(guidance_scale)
        shape = self.model.ae.latent_shape(self.frames, self.height, self.width)
        if latents is None:
            latents = keyed_normal(seed, "generate", indices, (self.model.ae.latent_channels, *shape))
        latents = latents.to(self.device, torch.float32)

        condition = self._encode(list(prompts))
        unconditional: dict[str, Any] | None = None
        if max(high, low) > 1.0:
            negative = self.negative_prompt if negative_prompt is None else negative_prompt
            unconditional = {
                name: value.expand(len(prompts), *value.shape[1:])
                for name, value in self._encode([negative]).items()
            }
        with self._experts() as denoise:
            clean = self.model.diffusion.sample(
                denoise,
                latents,
                condition,
                uncond_kwargs=unconditional,
                guidance=lambda t: high if self._is_high(t) else low,
                steps=steps,
                generator=[keyed_generator(seed, "generate steps", index) for index in indices],
                progress=progress,
            )
        with self._resident(self.model.ae):
            video: torch.Tensor = self.model.ae.decode(clean)
        return video.float().clamp(-1.0, 1.0).cpu()

    def _guidance(self, scale: float | Sequence[float] | None) -> tuple[float, float]:
        scale = self.model.diffusion.guidance_scale if scale is None else scale
        if isinstance(scale, int | float):
            return float(scale), float(scale)
        if len(scale) != 2 or self.boundary_ratio is None:
            mend = (
                "one expert, so give one number"
                if self.boundary_ratio is None
                else "two, so give two numbers"
            )
            raise UserError(
                f"WanPipeline: guidance_scale {list(scale)} does not fit the experts; this job has {mend}"
            )
        return float(scale[0]), float(scale[1])

    def _is_high(self, timestep: float) -> bool:
        if self.boundary_ratio is None:
            return True
        return timestep >= self.boundary_ratio * self.model.diffusion.num_train_timesteps

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Prompt embeddings `[B, L, D]` and their mask `[B, L]` as the predictor's keyword arguments."""
        ids, masks = (
            torch.stack(parts) for parts in zip(*map(self.tokenizer, prompts), strict=True)
        )  # [B, L]
        for text, tokens in zip(prompts, masks, strict=True):
            if bool(tokens.all()):
                logger.warning("a prompt fills all %d tokens and may be cut: %s…", len(tokens), text[:60])
        with self._resident(self.model.text_encoder):
            prompt, mask = self.model.encode_text(ids.to(self.device), masks.to(self.device))
        return {"prompt": prompt, "prompt_mask": mask}

    @contextmanager
    def _resident(self, module: nn.Module) -> Iterator[None]:
        """Have a component on the device for a while."""
        module.to(self.device)
        try:
            yield
        finally:
            if self.cpu_offload:
                module.to("cpu")

    @contextmanager
    def _experts(self) -> Iterator[Any]:
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
