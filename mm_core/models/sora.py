"""`SoRAModel`: a diffusion model for video, composed of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm_core.models.parking import Parked
from mm_core.models.protocols import Diffusion, I2VProcessor
from mm_core.sharding.mixin import FSDP2Mixin
from mm_core.sharding.policy import ShardingPolicy
from mm_registry.errors import UserError

EXPERTS = ("predictor", "low_noise_predictor")
EXPERT_NAMES = ("high", "low")
"""What metrics call them, where there are both."""


@dataclass(frozen=True, slots=True)
class EncoderUse:
    """How a training job uses its encoders.

    Attributes:
        interval: micro batches that are encoded at once, the encoders resting in host memory between; 1: they stay.
        shared: whether ranks that train on the same micro batches share the encoding.
    """

    interval: int = 1
    shared: bool = False


class SoRAModel(nn.Module, FSDP2Mixin):
    """Predictor, autoencoder, text encoder and diffusion of one video model.

    The predictors are trained, and each is an FSDP root of its own: call them directly. Autoencoder, text
    encoder and what encodes images stay frozen and in eval mode, whatever `train()` is told.

    Args:
        predictor: the network that denoises; None if only the encoders are needed.
        diffusion: noise, loss and sampling; see `mm_core.models.protocols.Diffusion`.
        ae: autoencoder between pixels and latents; None if batches bring latents.
        text_encoder: one, a sequence of several, or None if batches bring embeddings.
        low_noise_predictor: second expert, for the timesteps below the boundary; it is trained with the first.
        i2v_processor: what makes the conditions of given frames: `(ae, videos, latents, **batch) -> dict`, whose items
            are keyword arguments of the predictor and of `diffusion.q_sample`; None for text to video.
        sharding_policies: name of a predictor -> its policy; blocks are found by structure without.
    """

    def __init__(
        self,
        *,
        predictor: nn.Module | None = None,
        diffusion: Diffusion | None = None,
        ae: nn.Module | None = None,
        text_encoder: nn.Module | Sequence[nn.Module] | None = None,
        low_noise_predictor: nn.Module | None = None,
        i2v_processor: I2VProcessor | None = None,
        sharding_policies: Mapping[str, ShardingPolicy] | None = None,
    ) -> None:
        super().__init__()
        # Untyped on purpose: components are known by their protocols, not by a class.
        self.predictor: Any = predictor
        self.low_noise_predictor: Any = low_noise_predictor
        self.ae: Any = ae
        if isinstance(text_encoder, Sequence):
            text_encoder = nn.ModuleList(text_encoder) if len(text_encoder) > 1 else text_encoder[0]
        self.text_encoder: Any = text_encoder
        self.diffusion: Any = diffusion
        self.i2v_processor: Any = i2v_processor
        self.encoder_use = EncoderUse()
        self._parked: Parked | None = None
        self._sharding_policies = dict(sharding_policies or {})
        for encoder in self._encoders():
            encoder.requires_grad_(False)
        self.train()

    def _encoders(self) -> list[nn.Module]:
        parts = (self.ae, self.text_encoder, self.i2v_processor)
        return [part for part in parts if isinstance(part, nn.Module)]

    def park_encoders(self, device: torch.device) -> None:
        """Let the encoders rest in host memory from now on, outside `encoders_on_device`."""
        if self._parked is None:
            self._parked = Parked(self._encoders(), device)

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        """Inside, autoencoder, text encoders and image encoder are where they compute; needed by what calls them itself."""
        if self._parked is None:
            yield
            return
        with self._parked.on_device():
            yield

    @property
    def text_encoders(self) -> list[Any]:
        """All text encoders, also if there is one."""
        if self.text_encoder is None:
            return []
        return (
            list(self.text_encoder) if isinstance(self.text_encoder, nn.ModuleList) else [self.text_encoder]
        )

    def train(self, mode: bool = True) -> SoRAModel:
        """Put the predictors in training or eval mode; the encoders stay in eval mode."""
        super().train(mode)
        for encoder in self._encoders():
            encoder.eval()
        return self

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Name of what is trained -> module: one expert or both."""
        return {name: module for name in EXPERTS if (module := getattr(self, name)) is not None}

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the trained modules that learn their own samples, high noise first; empty if there is but one."""
        return EXPERTS if self.low_noise_predictor is not None else ()

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        """Each trained predictor by itself: a child of a sharded root cannot be called."""
        return {
            name: self._sharding_policies.get(name, ShardingPolicy())
            for name in EXPERTS
            if getattr(self, name) is not None
        }

    @torch.no_grad()
    def encode_video(
        self, video: torch.Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Video `[B, 3, T, H, W]` in [-1, 1] -> normalised latents `[B, C, T', h, w]`, at least fp32.

        Args:
            generators: one a sample, for an autoencoder that draws from its posterior (`do_sample`).

        Raises:
            ValueError: it draws and there are no generators: the draw would depend on rank and resume.
        """
        draws = getattr(self.ae, "do_sample", False)
        if draws and generators is None:
            raise ValueError(
                "the autoencoder draws its latents (do_sample): give a generator for each sample"
            )
        with self.encoders_on_device():
            options = {"generator": generators} if draws else {}
            latents: torch.Tensor = self.ae.encode(video, **options)
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    @torch.no_grad()
    def encode_text(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor],
        attention_mask: torch.Tensor | Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor | list[torch.Tensor], torch.Tensor | list[torch.Tensor]]:
        """Encode ids and masks `[B, L]`.

        With one text encoder: embeddings `[B, L, D]` and mask `[B, L]`. With several: ids and masks are
            sequences, one for each, and so
        are the results.

        Raises:
            UserError: the number of inputs is not that of text encoders.
        """
        encoders = self.text_encoders
        ids = [input_ids] if isinstance(input_ids, torch.Tensor) else list(input_ids)
        masks = [attention_mask] if isinstance(attention_mask, torch.Tensor) else list(attention_mask)
        if not len(encoders) == len(ids) == len(masks):
            raise UserError(
                f"text_encoder: the model has {len(encoders)}, but the batch brings {len(ids)} tokenised "
                "captions and "
                f"{len(masks)} masks; each text encoder needs a tokenizer of its own"
            )
        with self.encoders_on_device():
            embeddings, embedding_masks = zip(
                *(encoder.encode(i, m) for encoder, i, m in zip(encoders, ids, masks, strict=True)),
                strict=True,
            )
        if len(encoders) == 1:
            return embeddings[0], embedding_masks[0]
        return list(embeddings), list(embedding_masks)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, **conditions: Any) -> torch.Tensor:
        """Run the predictor: noised latents `[B, C, T, H, W]` and timesteps `[B]` -> its prediction."""
        output: torch.Tensor = self.predictor(latents, timestep, **conditions)
        return output
