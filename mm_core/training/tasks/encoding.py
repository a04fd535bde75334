"""From micro batches of videos and captions to what a diffusion task noises: latents and conditions."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mm_core.config.features import CONDITION
from mm_core.models.sora import SoRAModel
from mm_core.random import keyed_generator
from mm_core.training.tasks.encoding_shared import EncodingGroup, encoding_group
from mm_registry.errors import UserError

log = logging.getLogger(__name__)

_ENCODED = frozenset(
    {"video", "latents", "first_frame", "prompt", "prompt_ids", "prompt_mask", "sample_index"}
)


@dataclass(frozen=True)
class Encoded:
    """One micro batch behind the encoders."""

    latents: torch.Tensor  # [B, C, T', h, w], normalised, at least fp32
    conditions: dict[str, Any]  # keyword arguments of the predictor: prompt [B, L, D], prompt_mask [B, L], …
    sample_index: list[int]  # consumed-sample indices, which key all randomness
    beside: dict[str, Any] = field(
        default_factory=dict
    )  # of the batch, what is not encoded: sample_weight, file, …


class Encoders:
    """The frozen encoders of a job, applied to its micro batches.

    A micro batch that brings `latents` or `prompt` was encoded before (`mm extract-features`), and is only moved to the
    device.

    With `encoder_offload_interval` N the encoders rest in host memory; they come to the device for N micro batches at once.
    With `enable_encoder_dp` ranks that train on the same micro batches (context and tensor parallelism) encode one each, and
    hand it to the others. Neither changes a number: what is encoded is keyed by sample.

    Micro batches may have a method `peek(n)`: up to n of those that come after the ones that were taken, which are yielded
    later as the same objects. With it micro batches of later steps are encoded with those of this one.

    Args:
        model: its autoencoder, text encoders and image conditions; `encoder_use` says how they are used.
        seed: the run's seed.
        device: where they compute and what they make is left.
    """

    def __init__(self, model: SoRAModel, *, seed: int, device: torch.device) -> None:
        self.model = model
        self.seed = seed
        self.device = device
        use = model.encoder_use
        mesh = getattr(model, "parallel_mesh", None)
        self.group: EncodingGroup | None = encoding_group(mesh) if use.shared and mesh is not None else None
        ranks = 1 if self.group is None else self.group.size
        self.at_once = -(-use.interval // ranks) * ranks
        if use.interval > 1:
            model.park_encoders(device)
            log.info(
                "encoders rest in host memory; they come to the device for %d micro batches at once",
                self.at_once,
            )
        # Encoded ones that are not yet due, by the identity of their batch, which is kept so that it stays theirs.
        self._ready: dict[int, tuple[dict[str, Any], Encoded]] = {}

    def encode(self, micro_batches: Iterable[dict[str, Any]]) -> Iterator[Encoded]:
        """One item a micro batch, in order; batches are read when they are needed.

        Raises:
            UserError: the batch has videos or captions, and the model nothing to encode them.
        """
        rest = iter(micro_batches)
        peek = getattr(micro_batches, "peek", None)
        for batch in rest:
            if id(batch) in self._ready:
                yield self._ready.pop(id(batch))[1]
                continue
            more = self.at_once - 1
            later = peek(more) if peek is not None and more else []
            taken = (
                [] if later else list(itertools.islice(rest, more))
            )  # a stream is read no further than this step
            first, *others = self._encode_all([batch, *later, *taken])
            self._ready |= {id(one): (one, done) for one, done in zip(later, others, strict=False)}
            yield first
            yield from others[len(later) :]

    def _encode_all(self, batches: Sequence[dict[str, Any]]) -> list[Encoded]:
        with self.model.encoders_on_device():
            if self.group is None or len(batches) == 1:
                return [self._encode(batch) for batch in batches]
            own = {
                n: self._encode(batch)
                for n, batch in enumerate(batches)
                if n % self.group.size == self.group.rank
            }
        tensors = self.group.exchange(
            {n: {"latents": one.latents, **one.conditions} for n, one in own.items()},
            len(batches),
            self.device,
        )
        return [
            Encoded(each.pop("latents"), each, _indices(batch), _beside(batch))
            for each, batch in zip(tensors, batches, strict=True)
        ]

    @torch.no_grad()
    def _encode(self, batch: dict[str, Any]) -> Encoded:
        indices = _indices(batch)
        latents, conditions = clip_features(self.model, batch, self.device, self.seed, indices)
        conditions |= text_features(self.model, batch, self.device)
        return Encoded(latents, conditions, indices, _beside(batch))


@torch.no_grad()
def clip_features(
    model: SoRAModel, batch: dict[str, Any], device: torch.device, seed: int, keys: Sequence[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Latents `[B, C, T', h, w]` of a micro batch, at least fp32, and what is made of the given frames.

    Args:
        batch: with `video` `[B, 3, T, H, W]`, or `latents` and stored conditions.
        keys: of the samples, for an autoencoder that draws.

    Raises:
        UserError: there is no autoencoder for the videos.
    """
    stored = {
        name.removeprefix(CONDITION): value.to(device, non_blocking=True)
        for name, value in batch.items()
        if name.startswith(CONDITION)
    }
    if "latents" in batch:
        return batch["latents"].to(device, non_blocking=True), stored
    if model.ae is None:
        raise UserError(
            "the samples are videos, and there is no autoencoder: load_video_features is true, but data.json names no stored "
            "features"
        )
    video = batch["video"].to(device, non_blocking=True)  # [B, 3, T, H, W]
    with model.encoders_on_device():
        latents = model.encode_video(
            video, generators=[keyed_generator(seed, "autoencoder", k) for k in keys]
        )
        if model.i2v_processor is not None:
            rest = {name: value for name, value in batch.items() if name != "video"}
            stored |= model.i2v_processor(model.ae, video, latents, **rest)
    return latents, stored


@torch.no_grad()
def text_features(model: SoRAModel, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`prompt` `[B, L, D]` and `prompt_mask` `[B, L]` of a micro batch; a list each with several text encoders.

    Args:
        batch: with `prompt_ids` and `prompt_mask`, or with `prompt` and `prompt_mask`.

    Raises:
        UserError: there is no text encoder for the captions.
    """
    if "prompt" in batch:
        return {name: batch[name].to(device, non_blocking=True) for name in ("prompt", "prompt_mask")}
    if not model.text_encoders:
        raise UserError(
            "the samples have captions, and there is no text encoder: load_text_features is true, but data.json names no "
            "stored features"
        )
    with model.encoders_on_device():
        prompt, mask = model.encode_text(batch["prompt_ids"].to(device), batch["prompt_mask"].to(device))
    return {"prompt": prompt, "prompt_mask": mask}


def _beside(batch: dict[str, Any]) -> dict[str, Any]:
    return {n: value for n, value in batch.items() if n not in _ENCODED and not n.startswith(CONDITION)}


def _indices(batch: dict[str, Any]) -> list[int]:
    indices: list[int] = batch["sample_index"].tolist()
    return indices
