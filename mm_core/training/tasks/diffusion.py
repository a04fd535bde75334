"""Training a diffusion predictor: encode, add noise, predict, compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mm_core.models.sora import SoRAModel
from mm_core.random import keyed_generator, keyed_normal
from mm_core.training.tasks.base import LossParts


@dataclass(frozen=True)
class DiffusionInputs:
    """One prepared micro batch. `conditions` are keyword arguments of the predictor beside latents and timestep."""

    latents: torch.Tensor  # [B, C, T, H, W], normalised
    noised_latents: torch.Tensor  # [B, C, T, H, W]
    noise: torch.Tensor  # [B, C, T, H, W]
    timesteps: torch.Tensor  # [B], timestep values
    conditions: dict[str, Any]


class DiffusionTask:
    """The loss of `SoRAModel`: `diffusion.training_losses(predictor(x_t, t, prompt), x_0, x_t, noise, t)`.

    Noise and timestep of a sample are keyed by (seed, purpose, consumed-sample index): each sample has its own
    timestep, and neither the rank, the world size, the micro batch nor a resume changes it.

    Args:
        model: components; only its predictor is trained.
        seed: the run's seed.
        device: where inputs are put.
    """

    def __init__(self, model: SoRAModel, *, seed: int, device: torch.device) -> None:
        self.model = model
        self.seed = seed
        self.device = device

    def prepare(self, micro_batches: Iterable[dict[str, Any]]) -> Iterator[DiffusionInputs]:
        for batch in micro_batches:
            yield self._prepare(batch)

    @torch.no_grad()
    def _prepare(self, batch: dict[str, Any]) -> DiffusionInputs:
        indices: list[int] = batch["sample_index"].tolist()
        video = batch["video"].to(self.device, non_blocking=True)  # [B, 3, T, H, W]
        latents = self.model.encode_video(
            video, generators=[keyed_generator(self.seed, "autoencoder", i) for i in indices]
        )  # [B, C, T', h, w]
        prompt, prompt_mask = self.model.encode_text(
            batch["prompt_ids"].to(self.device), batch["prompt_mask"].to(self.device)
        )  # [B, L, D], [B, L]
        noise = keyed_normal(self.seed, "noise", indices, latents.shape[1:])
        noised, noise, timesteps = self.model.diffusion.q_sample(
            latents,
            noise=noise.to(latents.device, latents.dtype),
            generator=[keyed_generator(self.seed, "timestep", i) for i in indices],
        )
        return DiffusionInputs(
            latents=latents,
            noised_latents=noised,
            noise=noise,
            timesteps=timesteps,
            conditions={"prompt": prompt, "prompt_mask": prompt_mask},
        )

    def forward(self, model: torch.nn.Module, inputs: DiffusionInputs) -> torch.Tensor:
        # The predictor is its own FSDP root, so it is called directly and not through the composite.
        predictor: Any = model.predictor
        output: torch.Tensor = predictor(inputs.noised_latents, inputs.timesteps, **inputs.conditions)
        return output  # [B, C, T, H, W]

    def loss(self, outputs: torch.Tensor, inputs: DiffusionInputs) -> LossParts:
        losses = self.model.diffusion.training_losses(
            outputs, inputs.latents, inputs.noised_latents, inputs.noise, inputs.timesteps
        )  # [B] fp32
        return losses, torch.ones_like(losses), {}

    def tokens(self, inputs: DiffusionInputs) -> int:
        batch, _, *sizes = inputs.latents.shape
        patch = _patch_size(self.model.predictor)
        return batch * math.prod(-(-size // step) for size, step in zip(sizes, patch, strict=True))


def _patch_size(predictor: Any) -> tuple[int, ...]:
    """Latent frames, rows and columns of one token: `patch_size` of the predictor's config, or its own, where
    that says three numbers; else a token for each position.
    """
    # The config first: diffusers' models warn when they are asked for what is in theirs.
    for holder in (getattr(predictor, "config", None), predictor):
        patch = getattr(holder, "patch_size", None)
        if isinstance(patch, list | tuple) and len(patch) == 3:
            return tuple(patch)
    return (1, 1, 1)
