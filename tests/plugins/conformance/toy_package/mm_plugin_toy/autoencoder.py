"""A patchwise linear autoencoder that draws its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_registry.errors import UserError


class ToyVAE(nn.Module):
    """Blocks of 2 x 2 pixels to latent channels; frames stay."""

    do_sample = True

    def __init__(self, *, latent_channels: int = 4) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = nn.Linear(12, latent_channels)
        self.decoder = nn.Linear(latent_channels, 12)

    @classmethod
    def from_pretrained(cls, folder: str, *, dtype: torch.dtype | None = None, **fields: Any) -> ToyVAE:
        if not Path(folder).is_dir():
            raise UserError(f"toy_vae: {folder} is no folder")
        return cls(**fields).to(dtype or torch.float32)

    def latent_shape(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        if min(t, h, w) < 1 or h % 2 or w % 2:
            raise UserError(f"toy_vae: {t} x {h} x {w} cannot be encoded, height and width must be even")
        return t, h // 2, w // 2

    def encode(self, video: torch.Tensor, generator: Any = None) -> torch.Tensor:
        B, _, T, H, W = video.shape
        _, h, w = self.latent_shape(T, H, W)
        blocks = video.reshape(B, 3, T, h, 2, w, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(B, T, h, w, 12)
        mean = self.encoder(blocks.to(self.encoder.weight.dtype)).permute(0, 4, 1, 2, 3).float()
        keys = generator if isinstance(generator, list) else [generator] * B
        noise = torch.stack([torch.randn(mean.shape[1:], generator=key) for key in keys])
        return mean + 0.01 * noise

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        B, _, T, h, w = latents.shape
        blocks = self.decoder(latents.to(self.decoder.weight.dtype).permute(0, 2, 3, 4, 1)).tanh().float()
        blocks = blocks.reshape(B, T, h, w, 3, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        return blocks.reshape(B, 3, T, 2 * h, 2 * w)
