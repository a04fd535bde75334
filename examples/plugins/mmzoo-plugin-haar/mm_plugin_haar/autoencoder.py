"""A video autoencoder without weights: the orthonormal 3-D Haar wavelet transform (Haar, 1910), which
loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from mm_registry.errors import UserError


class HaarVideoAutoencoder(nn.Module):
    """Turns blocks of frames, rows and columns into latent channels, and back exactly.

    A block of `2**temporal_levels` frames by `2**spatial_levels` rows and columns of one colour becomes as
    many latent channels: the first is the block's mean (times a constant), the others are differences at
    ever finer scales.

    Args:
        temporal_levels, spatial_levels: how often the transform halves frames, and rows and columns.
        latents_mean, latents_std: for each latent channel; encode subtracts the one and divides by the
            other. `channel_statistics` measures them.

    Attributes:
        latent_channels: `3 * 2 ** (temporal_levels + 2 * spatial_levels)`.
        factors: frames, rows and columns of a block.
    """

    def __init__(
        self,
        *,
        temporal_levels: int = 1,
        spatial_levels: int = 1,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.factors = (2**temporal_levels, 2**spatial_levels, 2**spatial_levels)
        self.latent_channels = 3 * 2 ** (temporal_levels + 2 * spatial_levels)
        # Plain attributes in float64: a cast of the module to half precision must not touch them.
        self._bases = tuple(haar_basis(factor) for factor in self.factors)
        self._mean = self._per_channel("latents_mean", latents_mean, 0.0)
        self._std = self._per_channel("latents_std", latents_std, 1.0)

    def _per_channel(self, name: str, values: Sequence[float] | None, default: float) -> torch.Tensor:
        values = [default] * self.latent_channels if values is None else values
        if len(values) != self.latent_channels:
            raise UserError(
                f"haar_video: {name} has {len(values)} numbers for {self.latent_channels} latent channels"
            )
        return torch.tensor(values, dtype=torch.float64, device="cpu").view(1, -1, 1, 1, 1)

    def latent_shape(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """`(T', h', w')` of a video of `t` frames of `h` by `w` pixels.

        Raises:
            UserError: a size is not a multiple of its factor.
        """
        sizes = (t, h, w)
        for name, size, factor in zip(("frames", "height", "width"), sizes, self.factors, strict=True):
            if size < 1 or size % factor:
                raise UserError(
                    f"haar_video: {name} {size} is not a multiple of {factor}; choose "
                    f"{max(1, size // factor) * factor} "
                    f"or {(size // factor + 1) * factor}, or lower the levels"
                )
        ft, fh, fw = self.factors
        return t // ft, h // fh, w // fw

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Video `[B, 3, T, H, W]` -> normalised latents `[B, C, T', h, w]`, at least fp32."""
        B, colours, *sizes = video.shape
        T, h, w = self.latent_shape(*sizes)
        ft, fh, fw = self.factors
        blocks = _at_least_fp32(video).reshape(B, colours, T, ft, h, fh, w, fw)
        bases = [basis.to(blocks) for basis in self._bases]
        # t, y, x are positions inside a block; i, j, k count the basis functions along each axis
        latents = torch.einsum("bcTtHyWx,it,jy,kx->bcijkTHW", blocks, *bases).reshape(B, -1, T, h, w)
        return (latents - self._mean.to(latents)) / self._std.to(latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents `[B, C, T', h, w]` -> video `[B, 3, T, H, W]`, at least fp32. It is not
        clamped to [-1, 1].
        """
        B, channels, T, h, w = latents.shape
        if channels != self.latent_channels:
            raise UserError(f"haar_video: latents have {channels} channels, not {self.latent_channels}")
        ft, fh, fw = self.factors
        latents = _at_least_fp32(latents)
        latents = latents * self._std.to(latents) + self._mean.to(latents)
        bases = [basis.to(latents) for basis in self._bases]
        blocks = latents.reshape(B, 3, ft, fh, fw, T, h, w)
        # An orthonormal basis is inverted by its transpose.
        video = torch.einsum("bcijkTHW,it,jy,kx->bcTtHyWx", blocks, *bases)
        return video.reshape(B, 3, T * ft, h * fh, w * fw)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Encode and decode."""
        return self.decode(self.encode(video))


def haar_basis(size: int) -> torch.Tensor:
    """The orthonormal Haar basis of `size` samples (a power of two), one function a row, coarse to fine:
    `[size, size]` float64.
    """
    basis = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(basis) < size:
        sums = torch.kron(basis, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
        differences = torch.kron(
            torch.eye(len(basis), dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
        )
        basis = torch.cat([sums, differences]) / 2**0.5
    return basis


def channel_statistics(
    videos: Iterable[torch.Tensor], *, temporal_levels: int = 1, spatial_levels: int = 1
) -> tuple[list[float], list[float]]:
    """Measure `latents_mean` and `latents_std` on videos `[B, 3, T, H, W]` in [-1, 1].

    Raises:
        UserError: there is no video.
    """
    autoencoder = HaarVideoAutoencoder(temporal_levels=temporal_levels, spatial_levels=spatial_levels)
    flat = [autoencoder.encode(video).double().transpose(0, 1).flatten(1) for video in videos]
    if not flat:
        raise UserError("haar_video: no video to measure")
    values = torch.cat(flat, dim=1)  # [C, N]
    return values.mean(1).tolist(), values.std(1).clamp_min(1e-6).tolist()


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
