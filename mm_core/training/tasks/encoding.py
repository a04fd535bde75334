"""From micro batches of videos and captions to what a diffusion task noises: latents and conditions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mm_core.models.sora import SoRAModel
from mm_core.random import keyed_generator


@dataclass(frozen=True)
class Encoded:
    """One micro batch behind the encoders."""

    latents: torch.Tensor  # [B, C, T', h, w], normalised, at least fp32
    conditions: dict[str, Any]  # keyword arguments of the predictor: prompt [B, L, D], prompt_mask [B, L], …
    sample_index: list[int]  # consumed-sample indices, which key all randomness


class Encoders:
    """The frozen encoders of a job, applied to its micro batches.

    Args:
        model: its autoencoder and text encoders.
        seed: the run's seed.
        device: where they compute and what they make is left.
    """

    def __init__(self, model: SoRAModel, *, seed: int, device: torch.device) -> None:
        self.model = model
        self.seed = seed
        self.device = device

    def encode(self, micro_batches: Iterable[dict[str, Any]]) -> Iterator[Encoded]:
        """One item a micro batch, in order; batches are read when they are needed."""
        for batch in micro_batches:
            yield self._encode(batch)

    @torch.no_grad()
    def _encode(self, batch: dict[str, Any]) -> Encoded:
        indices: list[int] = batch["sample_index"].tolist()
        video = batch["video"].to(self.device, non_blocking=True)  # [B, 3, T, H, W]
        latents = self.model.encode_video(
            video, generators=[keyed_generator(self.seed, "autoencoder", i) for i in indices]
        )
        prompt, mask = self.model.encode_text(
            batch["prompt_ids"].to(self.device), batch["prompt_mask"].to(self.device)
        )
        return Encoded(latents, {"prompt": prompt, "prompt_mask": mask}, indices)
