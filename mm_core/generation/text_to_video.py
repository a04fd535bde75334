"""From prompts to videos: what pipelines of latent video diffusion share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mm_core.models.protocols import Denoiser, Guidance, Progress, Tokenizer
from mm_core.models.sora import SoRAModel
from mm_core.random import keyed_generator, keyed_normal
from mm_registry.errors import UserError

logger = logging.getLogger(__name__)


class TextToVideoPipeline:
    """Text to video: encode the prompt, draw noise, denoise with guidance, decode.

    A base class for pipelines. As it stands it serves a model of one expert; a subclass may add conditions
    (`conditions`), read `guidance_scale` otherwise (`guidance`), or choose between experts (`denoiser`).

    Args:
        model: predictor, autoencoder, text encoder and diffusion, with weights.
        tokenizer: of the text encoder.
        input_size: frames, height and width in pixels.
        negative_prompt: what guidance moves away from.
        cpu_offload: keep each component on the CPU while it is idle.
        seed: default seed of a call.
        device: where to compute; that of the predictor by default.
    """

    def __init__(
        self,
        model: SoRAModel,
        tokenizer: Tokenizer,
        *,
        input_size: Sequence[int],
        negative_prompt: str | None = None,
        cpu_offload: bool = False,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.negative_prompt = negative_prompt or ""
        self.cpu_offload = cpu_offload
        self.seed = seed or 0
        self.device = torch.device(device or next(model.predictor.parameters()).device)
        self.frames, self.height, self.width = input_size

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

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
            guidance_scale: as `guidance` reads it; the diffusion's by default. Above 1 each step predicts twice.
            negative_prompt: for this call.
            latents: noise `[B, C, T', h, w]` to start from instead.
            progress: called with (steps done, steps).

        Returns:
            `[B, 3, T, H, W]` fp32 in [-1, 1] on the CPU.

        Raises:
            UserError: a size that the autoencoder cannot make, or scales that do not fit the experts.
        """
        seed = self.seed if seed is None else seed
        indices = list(range(len(prompts)) if indices is None else indices)
        if len(indices) != len(prompts):
            raise ValueError(f"{len(indices)} indices for {len(prompts)} prompts")
        default = self.model.diffusion.guidance_scale
        guidance, guided = self.guidance(default if guidance_scale is None else guidance_scale)
        shape = self.model.ae.latent_shape(self.frames, self.height, self.width)
        if latents is None:
            latents = keyed_normal(seed, "generate", indices, (self.model.ae.latent_channels, *shape))
        condition = self.encode(list(prompts))
        unconditional: dict[str, Any] | None = None
        if guided:
            negative = self.negative_prompt if negative_prompt is None else negative_prompt
            unconditional = {
                name: value.expand(len(prompts), *value.shape[1:])
                for name, value in self.encode([negative]).items()
            }
        more = self.conditions()
        with self.denoiser() as denoise:
            clean = self.model.diffusion.sample(
                denoise,
                latents.to(self.device, torch.float32),
                {**condition, **more},
                uncond_kwargs=None if unconditional is None else {**unconditional, **more},
                guidance=guidance,
                steps=steps,
                generator=[keyed_generator(seed, "generate steps", index) for index in indices],
                progress=progress,
            )
        with self.resident(self.model.ae):
            video: torch.Tensor = self.model.ae.decode(clean)
        return video.float().clamp(-1.0, 1.0).cpu()

    def conditions(self) -> Mapping[str, Any]:
        """Return more keyword arguments for the predictor, the same in each step; none by default."""
        return {}

    def guidance(self, scale: float | Sequence[float]) -> tuple[Guidance, bool]:
        """Return what the diffusion is given, and whether anything is guided at all.

        Raises:
            UserError: several scales for one expert.
        """
        if not isinstance(scale, int | float):
            raise UserError(
                f"{self.name}: guidance_scale {list(scale)} does not fit the experts; this job has one "
                "expert, so give one number"
            )
        return float(scale), scale > 1.0

    @contextmanager
    def denoiser(self) -> Iterator[Denoiser]:
        """Yield what denoises, on the device: the predictor."""
        with self.resident(self.model.predictor):
            yield self.model.predictor

    def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Prompt embeddings `[B, L, D]` and their mask `[B, L]` as the predictor's keyword arguments."""
        ids, masks = (
            torch.stack(parts) for parts in zip(*map(self.tokenizer, prompts), strict=True)
        )  # [B, L]
        for text, tokens in zip(prompts, masks, strict=True):
            if bool(tokens.all()):
                logger.warning("a prompt fills all %d tokens and may be cut: %s…", len(tokens), text[:60])
        with self.resident(self.model.text_encoder):
            prompt, mask = self.model.encode_text(ids.to(self.device), masks.to(self.device))
        return {"prompt": prompt, "prompt_mask": mask}

    @contextmanager
    def resident(self, module: nn.Module) -> Iterator[None]:
        """Have a component on the device for a while."""
        module.to(self.device)
        try:
            yield
        finally:
            if self.cpu_offload:
                module.to("cpu")
