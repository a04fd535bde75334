"""What Wan's image-conditioned models are given beside the noised latents, made from the given frames.

Two networks, two ways. `wan_i2v_processor`: the latents of a video of which only the given frames are there, and a
mask that says which (Wan2.1 i2v and flf2v, Wan2.2 A14B i2v). `wan_ti2v_processor`: the latents of the first frame,
which take the place of the noised ones (Wan2.2 5B).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel

from mm_core.models.pretrained import load_pretrained
from mm_registry.errors import UserError

Tiling = Literal["auto"] | bool

# Of the images that CLIP was trained on (Radford et al., 2021).
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class _Processor(nn.Module):
    """What both have: the CLIP encoder, if there is one, and how the given frames are encoded.

    Args:
        image_encoder: folder of a CLIP image encoder, kept in fp32 as upstream runs it; None if the network embeds none.
        i2v_vae_encode_tiling: whether the given frames are encoded in tiles; `auto` as the video is.
    """

    name: str

    def __init__(self, *, image_encoder: str | None = None, i2v_vae_encode_tiling: Tiling = "auto") -> None:
        super().__init__()
        self.tiling: Tiling = i2v_vae_encode_tiling
        self.image_encoder: CLIPVisionModel | None = None
        if image_encoder is not None:
            what = "ae.i2v_processor.image_encoder"
            model = load_pretrained(CLIPVisionModel, image_encoder, dtype=torch.float32, what=what)
            self.image_encoder = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, ae: Any, videos: torch.Tensor, latents: torch.Tensor | None = None, **batch: Any
    ) -> dict[str, torch.Tensor]:
        """Videos `[B, 3, T, H, W]` in [-1, 1] -> the predictor's conditions, in training.

        Args:
            ae: the autoencoder; see `conditions`.
            latents: not needed; the given frames are encoded by themselves, without a draw from the posterior.
            batch: the rest of the micro batch; its `first_frame` `[B, 3, H, W]`, if it has one, is given instead of
                the video's first frame.
        """
        first = batch.get("first_frame")
        first = videos[:, :, 0] if first is None else first.to(videos.device)
        if first.shape != videos[:, :, 0].shape:
            raise UserError(
                f"{self.name}: the first frame has {first.shape[-2]} x {first.shape[-1]} pixels and the video "
                f"{videos.shape[-2]} x {videos.shape[-1]}; train_pipeline.first_frame_vae must keep its size"
            )
        return self.conditions(ae, first, frames=videos.shape[2], last=self._last(videos))

    def _last(self, videos: torch.Tensor) -> torch.Tensor | None:
        return None

    def conditions(
        self, ae: Any, first: torch.Tensor, *, frames: int, last: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Given frames -> the predictor's conditions, in training and generation alike.

        Args:
            ae: a `WanVideoVAE`.
            first, last: frames `[B, 3, H, W]` in [-1, 1].
            frames: T of the video that they belong to.
        """
        raise NotImplementedError

    def clip_feature(self, *images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images `[B, 3, H, W]` in [-1, 1] -> `clip_feature` `[B, 257 n, D]` fp32 of n images a sample, one after the
        other; nothing without an encoder.

        As Wan2.1 does it: scaled to a square whatever their sides, and the last layer but one.
        """
        if self.image_encoder is None:
            return {}
        size = int(self.image_encoder.config.image_size)
        device = images[0].device
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (_CLIP_MEAN, _CLIP_STD))
        features = []
        for image in images:
            pixels = F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=False)
            pixels = (pixels * 0.5 + 0.5 - mean) / std
            output = self.image_encoder(pixel_values=pixels, output_hidden_states=True)
            features.append(output.hidden_states[-2])  # [B, 257, D]
        return {"clip_feature": torch.cat(features, 1)}

    @contextmanager
    def _tiling(self, ae: Any) -> Iterator[None]:
        if self.tiling == "auto":
            yield
        else:
            with ae.tiled(self.tiling):
                yield

    def _encode(self, ae: Any, video: torch.Tensor) -> torch.Tensor:
        """Normalised latents, always the mode: what is given is not drawn."""
        with self._tiling(ae):
            latents: torch.Tensor = ae.encode(video, do_sample=False)
        return latents


class WanI2VProcessor(_Processor):
    """First frame, or first and last frame, as latents and a mask (Wan et al., 2025; diffusers'
    `WanImageToVideoPipeline.prepare_latents`).

    Args:
        last_frame: whether training gives the video's last frame too, which models of type `flf2v` need.
        image_encoder, i2v_vae_encode_tiling: as the base class has them.
    """

    name = "wan_i2v_processor"

    def __init__(self, *, last_frame: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.last_frame = last_frame

    def _last(self, videos: torch.Tensor) -> torch.Tensor | None:
        return videos[:, :, -1] if self.last_frame else None

    @torch.no_grad()
    def conditions(
        self, ae: Any, first: torch.Tensor, *, frames: int, last: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `i2v_vae_feature` `[B, F + C, T', h, w]`: a mask of F channels, 1 where a frame is given, one channel for
        each of the F frames of a latent one, and C normalised latents of the video whose other frames are grey; and
        `clip_feature`, see the method.

        Raises:
            UserError: first and last frame of a video of one.
        """
        if last is not None and frames < 2:
            raise UserError(
                f"{self.name}: a first and a last frame need a video of at least 2 frames, not {frames}"
            )
        batch, channels, height, width = first.shape
        video = first.new_zeros(batch, channels, frames, height, width)
        video[:, :, 0] = first
        if last is not None:
            video[:, :, -1] = last
        latents = self._encode(ae, video)  # [B, C, T', h, w]
        # The first latent frame stands for one frame, which fills all its channels; each later one for F.
        mask = latents.new_zeros(batch, ae.factors[0], *latents.shape[2:])
        mask[:, :, 0] = 1
        if last is not None:
            mask[:, -1, -1] = 1
        images = (first,) if last is None else (first, last)
        return {"i2v_vae_feature": torch.cat([mask, latents], 1), **self.clip_feature(*images)}


class WanTI2VProcessor(_Processor):
    """The first frame's latents (diffusers' `WanImageToVideoPipeline` with `expand_timesteps`)."""

    name = "wan_ti2v_processor"

    @torch.no_grad()
    def conditions(
        self, ae: Any, first: torch.Tensor, *, frames: int, last: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `first_frame_latents` `[B, C, 1, h, w]`, normalised.

        Raises:
            UserError: a last frame is given, which these models do not know.
        """
        if last is not None:
            raise UserError(f"{self.name}: models of type ti2v are given a first frame only, no last one")
        return {"first_frame_latents": self._encode(ae, first.unsqueeze(2))}
