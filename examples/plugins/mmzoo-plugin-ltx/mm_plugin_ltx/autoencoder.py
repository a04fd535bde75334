"""LTX-Video's autoencoder with normalised latents, computed by diffusers' AutoencoderKLLTXVideo."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo
from torch import nn

from mm_core.models.autoencoders import check_folder_agrees, posterior_latents
from mm_core.models.pretrained import load_pretrained
from mm_core.models.protocols import Generators
from mm_registry.errors import UserError

_STATISTICS = ("latents_mean", "latents_std")
# The decoder's sizes are the encoder's where a section builds a network.
_MIRRORED = {
    "block_out_channels": "decoder_block_out_channels",
    "layers_per_block": "decoder_layers_per_block",
    "spatio_temporal_scaling": "decoder_spatio_temporal_scaling",
}
# Upstream's defaults have one entry for each of four blocks; other depths need as many.
_PER_BLOCK = {
    "down_block_types": "LTXVideoDownBlock3D",
    "downsample_type": "conv",
    "upsample_residual": False,
    "upsample_factor": 1,
}


class LTXVideoVAE(nn.Module):
    """The causal 3-D autoencoder of LTX-Video: 128 channels, 8 x 32 x 32 pixels a latent in the published
    ones.

    Args:
        model: the network to wrap; None builds one with random weights from `architecture`.
        do_sample: whether `encode` draws from the posterior; otherwise it takes its mode.
        enable_tiling: encode and decode large videos in upstream's overlapping tiles.
        decode_timestep: what a decoder with `timestep_conditioning` is told; no noise is added to latents.
        architecture: upstream's constructor arguments (`latent_channels`, `block_out_channels`, …), with
            `latents_mean` and `latents_std`; None and left-out ones take upstream's value. Beside `model`
            they must agree with its config.

    Attributes:
        model: the diffusers module.
        latent_channels: C of the latents.
        factors: frames, rows and columns of pixels for one of the latents.

    Raises:
        UserError: arguments that contradict each other or the pretrained config.
    """

    def __init__(
        self,
        model: AutoencoderKLLTXVideo | None = None,
        *,
        do_sample: bool = True,
        enable_tiling: bool = False,
        decode_timestep: float = 0.0,
        **architecture: Any,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in architecture.items() if value is not None}
        if model is None:
            model = _build(given)
        else:
            check_folder_agrees("ltx_video_vae", given, model.config, in_weights=_STATISTICS)
        self.model = model
        self.do_sample = do_sample
        self.decode_timestep = decode_timestep
        self.latent_channels = int(model.config.latent_channels)
        spatial = int(model.spatial_compression_ratio)
        self.factors = (int(model.temporal_compression_ratio), spatial, spatial)
        # Plain attributes beside the network's buffers, which follow .to(bf16): latents are normalised in
        # fp32. What is on the meta device has no numbers; the buffers' first values are these.
        channels = (1, -1, 1, 1, 1)
        self._mean = _numbers(model.latents_mean, 0.0).view(channels)
        self._std = _numbers(model.latents_std, 1.0).view(channels)
        self._scale = float(model.config.scaling_factor)
        if enable_tiling:
            model.enable_tiling()

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **fields: Any
    ) -> LTXVideoVAE:
        """Load a diffusers folder (config.json and safetensors); nothing is fetched, nothing is left at
        random values.

        Raises:
            UserError: no such folder, missing or misshapen weights, or fields that contradict its config.
        """
        # In fp32 first: the statistics of the latents are tensors of the folder, and stay exact.
        network = load_pretrained(AutoencoderKLLTXVideo, folder, dtype=torch.float32, what="ae")
        wrapped = cls(network, **fields)
        network.to(dtype or torch.float32)
        return wrapped

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype; inputs are cast to it."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def latent_shape(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """`(T', h', w')` of a video of `t` frames of `h` by `w` pixels.

        Raises:
            UserError: `t` is not a multiple of the temporal factor and one more (8k + 1), or a side is no
                multiple of the spatial factor. Upstream would drop the rest silently.
        """
        frames, rows, columns = self.factors
        if t < 1 or (t - 1) % frames:
            near = max(0, (t - 1) // frames) * frames + 1
            raise UserError(
                f"ltx_video_vae: {t} frames cannot be encoded, the number must be {frames}k + 1; nearest are "
                f"{near} and {near + frames}"
            )
        if h % rows or w % columns or h < 1 or w < 1:
            raise UserError(
                f"ltx_video_vae: {h} x {w} pixels cannot be encoded, height and width must be multiples of "
                f"{rows}"
            )
        return 1 + (t - 1) // frames, h // rows, w // columns

    def encode(self, video: torch.Tensor, generator: Generators | None = None) -> torch.Tensor:
        """Video `[B, 3, T, H, W]` in [-1, 1] -> normalised latents `[B, C, T', h, w]`, at least fp32.

        Args:
            generator: for `do_sample`, one for all or one a sample; torch's global one if None.
        """
        self.latent_shape(*video.shape[2:])
        posterior = self.model.encode(video.to(self.dtype)).latent_dist
        latents = posterior_latents(posterior, do_sample=self.do_sample, generator=generator)
        return (latents - self._mean.to(latents)) * self._scale / self._std.to(latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents `[B, C, T', h, w]` -> video `[B, 3, T, H, W]` in [-1, 1], at least fp32.

        Raises:
            UserError: the decoder draws noise of its own (`decoder_inject_noise`, version 0.9.1), which no
                seed of ours would reach.
        """
        if any(self.model.config.decoder_inject_noise):
            raise UserError(
                "ltx_video_vae: this decoder draws noise (decoder_inject_noise in its config.json), so its "
                "videos could not be made again; it encodes for training, and another version decodes"
            )
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        latents = latents * self._std.to(latents) / self._scale + self._mean.to(latents)
        timestep = None
        if self.model.config.timestep_conditioning:
            timestep = latents.new_full((len(latents),), self.decode_timestep).to(self.dtype)
        video: torch.Tensor = self.model.decode(latents.to(self.dtype), timestep).sample
        return video.to(torch.promote_types(video.dtype, torch.float32))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Reconstruct a video."""
        return self.decode(self.encode(video))


def _build(given: Mapping[str, Any]) -> AutoencoderKLLTXVideo:
    """A network with random weights."""
    fields = {name: value for name, value in given.items() if name not in _STATISTICS}
    blocks = len(fields.get("block_out_channels", (128, 256, 512, 512)))
    for name, decoder in _MIRRORED.items():
        if name in fields:
            fields[name] = tuple(fields[name])
            fields[decoder] = fields[name]
    for name, value in _PER_BLOCK.items():
        fields[name] = (value,) * blocks
    fields["decoder_inject_noise"] = (False,) * (blocks + 1)
    for name, length in (("spatio_temporal_scaling", blocks), ("layers_per_block", blocks + 1)):
        found = len(fields.get(name, (None,) * (4 + length - blocks)))
        if found != length:
            raise UserError(
                f"ltx_video_vae: {name} has {found} entries, but block_out_channels of {blocks} needs {length}"
            )
    model = AutoencoderKLLTXVideo(**fields)
    for name in _STATISTICS:
        buffer: torch.Tensor = getattr(model, name)
        if name in given:
            values: Sequence[float] = given[name]
            if len(values) != len(buffer):
                raise UserError(
                    f"ltx_video_vae: {name} has {len(values)} entries for {len(buffer)} latent channels"
                )
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
    return model


def _numbers(buffer: torch.Tensor, initial: float) -> torch.Tensor:
    if buffer.is_meta:
        return torch.full(buffer.shape, initial, device="cpu")
    return buffer.detach().to("cpu", torch.float32, copy=True)
