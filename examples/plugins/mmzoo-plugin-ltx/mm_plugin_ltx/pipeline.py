"""From prompts to videos with LTX-Video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mm_core.models.protocols import Progress, Tokenizer
from mm_core.models.sora import SoRAModel
from mm_core.random import keyed_generator, keyed_normal
from mm_registry.errors import UserError


class LTXPipeline:
    """Text to video: encode the prompt, draw noise, denoise with guidance, decode.

    Args:
        model: predictor, autoencoder, text encoder and diffusion, with weights.
        tokenizer: of the text encoder.
        input_size: frames, height and width in pixels.
        frame_rate: frames a second that the model is told; the predictor's own by default.
        negative_prompt: what guidance moves away from.
        seed: default seed of a call.
        device: where to compute; that of the predictor by default.

    Raises:
        UserError: there is a second expert, which LTX-Video has not.
    """

    def __init__(
        self,
        model: SoRAModel,
        tokenizer: Tokenizer,
        *,
        input_size: Sequence[int],
        frame_rate: float | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if model.low_noise_predictor is not None:
            raise UserError(
                "LTXPipeline: low_noise_predictor is given, but LTX-Video has one expert; remove it"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.input_size = input_size
        self.conditions = {} if frame_rate is None else {"frame_rate": frame_rate}
        self.negative_prompt = negative_prompt or ""
        self.seed = seed or 0
        self.device = torch.device(device or next(model.predictor.parameters()).device)

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
            guidance_scale: one number; the diffusion's by default. Above 1 each step predicts twice.
            negative_prompt: for this call.
            latents: noise `[B, C, T', h, w]` to start from instead.
            progress: called with (steps done, steps).

        Returns:
            `[B, 3, T, H, W]` fp32 in [-1, 1] on the CPU.

        Raises:
            UserError: a size that the autoencoder cannot make, or two guidance scales.
        """
        seed = self.seed if seed is None else seed
        indices = list(range(len(prompts)) if indices is None else indices)
        if len(indices) != len(prompts):
            raise ValueError(f"{len(indices)} indices for {len(prompts)} prompts")
        scale = self.model.diffusion.guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(scale, int | float):
            raise UserError(f"LTXPipeline: guidance_scale {list(scale)}: give one number, for one expert")
        ae = self.model.ae
        shape = ae.latent_shape(*self.input_size)
        if latents is None:
            latents = keyed_normal(seed, "generate", indices, (ae.latent_channels, *shape))
        condition = self._encode(list(prompts))
        unconditional = None
        if scale > 1.0:
            negative = self.negative_prompt if negative_prompt is None else negative_prompt
            unconditional = self._encode([negative] * len(prompts))
        clean = self.model.diffusion.sample(
            self.model.predictor,
            latents.to(self.device, torch.float32),
            condition,
            uncond_kwargs=unconditional,
            guidance=float(scale),
            steps=steps,
            generator=[keyed_generator(seed, "generate steps", index) for index in indices],
            progress=progress,
        )
        video: torch.Tensor = ae.decode(clean)
        return video.float().clamp(-1.0, 1.0).cpu()

    def _encode(self, prompts: list[str]) -> dict[str, Any]:
        """Embeddings `[B, L, D]` and their mask `[B, L]` as the predictor's keyword arguments."""
        ids, masks = (torch.stack(parts) for parts in zip(*map(self.tokenizer, prompts), strict=True))
        prompt, mask = self.model.encode_text(ids.to(self.device), masks.to(self.device))
        return {"prompt": prompt, "prompt_mask": mask, **self.conditions}
