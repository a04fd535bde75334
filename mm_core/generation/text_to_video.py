"""From prompts to videos: what pipelines of latent video diffusion share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mm_core.models.patches import patch_size
from mm_core.models.protocols import Denoiser, Guidance, Progress, Tokenizer
from mm_core.models.sora import SoRAModel
from mm_core.random import keyed_generator, keyed_normal
from mm_registry.errors import UserError

logger = logging.getLogger(__name__)


class TextToVideoPipeline:
    """Text to video: encode the prompt, draw noise, denoise with guidance, decode.

    A base class for pipelines. As it stands it serves a model of one expert, which is given frames if the model has an
    `i2v_processor`; a subclass may add conditions (`conditions`), choose what makes them of given frames
    (`image_processor`), read `guidance_scale` otherwise (`guidance`), or choose between experts (`denoiser`).

    What the processor calls `first_frame_latents` `[B, C, 1, h, w]` stands in place of the first latent frame in every
    step, and in the result.

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
        first_frames: torch.Tensor | None = None,
        last_frames: torch.Tensor | None = None,
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
            first_frames, last_frames: `[B, 3, H, W]` in [-1, 1] that the videos begin and end with; their size is the
                videos', whatever `input_size` says.
            progress: called with (steps done, steps).

        Returns:
            `[B, 3, T, H, W]` fp32 in [-1, 1] on the CPU.

        Raises:
            UserError: a size that the autoencoder cannot make, scales that do not fit the experts, or frames that are
                given to a model of text alone.
        """
        seed = self.seed if seed is None else seed
        indices = list(range(len(prompts)) if indices is None else indices)
        if len(indices) != len(prompts):
            raise ValueError(f"{len(indices)} indices for {len(prompts)} prompts")
        default = self.model.diffusion.guidance_scale
        guidance, guided = self.guidance(default if guidance_scale is None else guidance_scale)
        height, width = (self.height, self.width) if first_frames is None else first_frames.shape[-2:]
        shape = self.model.ae.latent_shape(self.frames, height, width)
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
        more = dict(self.conditions())
        if first_frames is not None:
            more |= self.image_conditions(first_frames, last_frames)
        elif last_frames is not None or self.needs_first_frame:
            raise UserError(f"{self.name}: this model is given the first frame of a video; add --image FILE")
        known = more.get("first_frame_latents")
        with self.denoiser() as denoise:
            clean = self.model.diffusion.sample(
                denoise if known is None else _beginning_with(known, denoise),
                latents.to(self.device, torch.float32),
                {**condition, **more},
                uncond_kwargs=None if unconditional is None else {**unconditional, **more},
                guidance=guidance,
                steps=steps,
                generator=[keyed_generator(seed, "generate steps", index) for index in indices],
                progress=progress,
            )
        if known is not None:
            clean = _begun_with(known, clean)
        with self.resident(self.model.ae):
            video: torch.Tensor = self.model.ae.decode(clean)
        return video.float().clamp(-1.0, 1.0).cpu()

    def conditions(self) -> Mapping[str, Any]:
        """Return more keyword arguments for the predictor, the same in each step; none by default."""
        return {}

    def image_processor(self) -> Any:
        """Return what makes conditions of given frames: the model's `i2v_processor`, which for generation has
        `conditions(ae, first, *, frames, last) -> dict`.

        Raises:
            UserError: it has none.
        """
        processor = getattr(self.model, "i2v_processor", None)
        if not hasattr(processor, "conditions"):
            raise UserError(
                f"{self.name}: an image is given, but this model makes videos from a text alone; remove image, or give ae "
                "an i2v_processor"
            )
        return processor

    @property
    def needs_first_frame(self) -> bool:
        """Whether the model makes no video without one."""
        return False

    @property
    def size_steps(self) -> tuple[int, int]:
        """Pixels of which height and width have to be multiples.

        Raises:
            UserError: the autoencoder does not tell.
        """
        factors = getattr(self.model.ae, "factors", None)
        if factors is None:
            raise UserError(
                f"{self.name}: max_hxw needs an autoencoder that tells its factors; leave it out, and give input_size"
            )
        patch = patch_size(self.model.predictor)
        return factors[1] * patch[1], factors[2] * patch[2]

    def image_conditions(
        self, first_frames: torch.Tensor, last_frames: torch.Tensor | None
    ) -> Mapping[str, Any]:
        """Return the predictor's keyword arguments that given frames become.

        Args:
            first_frames, last_frames: `[B, 3, H, W]` in [-1, 1].
        """
        processor = self.image_processor()
        first = first_frames.to(self.device)
        last = None if last_frames is None else last_frames.to(self.device)
        with self.resident(self.model.ae), self.resident(processor):
            made: Mapping[str, Any] = processor.conditions(
                self.model.ae, first, frames=self.frames, last=last
            )
        return made

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
    def resident(self, module: Any) -> Iterator[None]:
        """Have a component on the device for a while; what is no module has nothing there."""
        if not isinstance(module, nn.Module):
            yield
            return
        module.to(self.device)
        try:
            yield
        finally:
            if self.cpu_offload:
                module.to("cpu")


def _begun_with(first: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Latents `[B, C, T', h, w]` with `first` `[B, C, 1, h, w]` in place of their first frame."""
    return torch.cat([first.to(latents), latents[:, :, 1:]], dim=2)


def _beginning_with(first: torch.Tensor, denoise: Denoiser) -> Denoiser:
    """What denoises, shown the given first frame in each step."""

    def with_first(latents: torch.Tensor, timestep: torch.Tensor, **conditions: Any) -> torch.Tensor:
        return denoise(_begun_with(first, latents), timestep, **conditions)

    return with_first
