"""Wan's video autoencoder with normalised latents, computed by diffusers' AutoencoderKLWan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from mm_core.models.autoencoders import check_folder_agrees, posterior_latents
from mm_core.models.pretrained import load_pretrained
from mm_core.models.protocols import Generators
from mm_registry.errors import UserError

NORM_MODES = ("channel_specified_shift_scale", "value_shift_scale")
_FRAMES_A_CHUNK = 4  # upstream's encoder reads one frame, then groups of four


class WanVideoVAE(nn.Module):
    """The causal 3-D VAE of Wan2.1 (16 channels, 4 x 8 x 8) and Wan2.2's 5B (48 channels, 4 x 16 x 16).

    Args:
        model: the network to wrap; None builds one with random weights from `architecture`.
        do_sample: whether `encode` draws from the posterior; otherwise it takes its mode.
        norm_latents: whether latents are normalised at all.
        norm_mode: `channel_specified_shift_scale`: `(z - latents_mean) / latents_std` for each channel, as
            every published Wan model expects; `value_shift_scale`: `(z - shift_factor) * scaling_factor`.
        shift_factor, scaling_factor: for `value_shift_scale`; by default those of the network's config.
        enable_tiling, tiling_param: encode and decode in overlapping tiles; sizes and strides in pixels.
        i2v_processor: not used; its section is a component of its own.
        architecture: upstream's constructor arguments (`base_dim`, `z_dim`, `dim_mult`, `latents_mean`, …);
            None and left-out ones take upstream's value. Beside `model` they must agree with its config.

    Attributes:
        model: the diffusers module.
        latent_channels: C of the latents.
        factors: frames, rows and columns of pixels for one of the latents.

    Raises:
        UserError: arguments that contradict each other or the pretrained config.
    """

    def __init__(
        self,
        model: AutoencoderKLWan | None = None,
        *,
        do_sample: bool = True,
        norm_latents: bool = True,
        norm_mode: str = "channel_specified_shift_scale",
        shift_factor: float | None = None,
        scaling_factor: float | None = None,
        enable_tiling: bool = False,
        tiling_param: Mapping[str, int] | None = None,
        i2v_processor: Any = None,
        **architecture: Any,
    ) -> None:
        super().__init__()
        if norm_mode not in NORM_MODES:
            raise UserError(f"wan_video_vae: norm_mode {norm_mode!r} is none of {', '.join(NORM_MODES)}")
        given = {name: value for name, value in architecture.items() if value is not None}
        if model is None:
            model = _build(given)
        else:
            check_folder_agrees("wan_video_vae", given, model.config)
        self.model = model
        self.do_sample = do_sample
        config = model.config
        self.latent_channels = int(config.z_dim)
        self.factors = _factors(config)
        self._set_norm(norm_latents, norm_mode, shift_factor, scaling_factor)
        model.enable_tiling(**_tiles(tiling_param or {}, self.factors[1]))
        model.use_tiling = enable_tiling  # the sizes hold for `tiled(True)` as well

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **fields: Any
    ) -> WanVideoVAE:
        """Load a diffusers folder (config.json and safetensors); nothing is fetched, nothing is left at
        random values.

        Raises:
            UserError: no such folder, missing or misshapen weights, or fields that contradict its config.
        """
        return cls(load_pretrained(AutoencoderKLWan, folder, dtype=dtype, what="ae"), **fields)

    def _set_norm(
        self, norm_latents: bool, mode: str, shift_factor: float | None, scaling_factor: float | None
    ) -> None:
        config = self.model.config
        shift: Sequence[float]
        scale: Sequence[float]
        if not norm_latents:
            shift, scale = [0.0], [1.0]
        elif mode == "channel_specified_shift_scale":
            shift, scale = config.latents_mean, [1.0 / std for std in config.latents_std]
        else:
            if shift_factor is None:
                shift_factor = getattr(config, "shift_factor", None)
            if scaling_factor is None:
                scaling_factor = getattr(config, "scaling_factor", None)
            if shift_factor is None or scaling_factor is None:
                raise UserError(
                    "wan_video_vae: norm_mode value_shift_scale needs shift_factor and scaling_factor, "
                    "which its config.json does not have; "
                    'give both in the ae section, or write "norm_mode": "channel_specified_shift_scale"'
                )
            shift, scale = [shift_factor], [scaling_factor]
        # Plain attributes: buffers would follow .to(bf16), and normalisation is done in fp32.
        self._shift = torch.tensor(shift, dtype=torch.float32, device="cpu").view(1, -1, 1, 1, 1)
        self._scale = torch.tensor(scale, dtype=torch.float32, device="cpu").view(1, -1, 1, 1, 1)

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype; inputs are cast to it."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def latent_shape(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """`(T', h', w')` of a video of `t` frames of `h` by `w` pixels.

        Raises:
            UserError: `t` is not 4k + 1, or a side is not a multiple of the spatial factor. Upstream would
                drop the rest silently.
        """
        frames, rows, columns = self.factors
        if t < 1 or (t - 1) % _FRAMES_A_CHUNK:
            near = max(0, (t - 1) // _FRAMES_A_CHUNK) * _FRAMES_A_CHUNK + 1
            raise UserError(
                f"wan_video_vae: {t} frames cannot be encoded, the number must be 4k + 1; nearest are "
                f"{near} and {near + _FRAMES_A_CHUNK}"
            )
        if h % rows or w % columns or h < 1 or w < 1:
            raise UserError(
                f"wan_video_vae: {h} x {w} pixels cannot be encoded, height must be a multiple of {rows} "
                f"and width of {columns}"
            )
        return 1 + (t - 1) // frames, h // rows, w // columns

    @contextmanager
    def tiled(self, enabled: bool) -> Iterator[None]:
        """Encode and decode in tiles, or not, whatever the section says."""
        before = self.model.use_tiling
        self.model.use_tiling = enabled
        try:
            yield
        finally:
            self.model.use_tiling = before

    def encode(
        self,
        video: torch.Tensor,
        generator: Generators | None = None,
        *,
        do_sample: bool | None = None,
    ) -> torch.Tensor:
        """Video `[B, 3, T, H, W]` in [-1, 1] -> normalised latents `[B, C, T', h, w]`, at least fp32.

        Args:
            generator: for `do_sample`, one for all or one a sample; torch's global one if None.
            do_sample: None is what the autoencoder was built with.
        """
        self.latent_shape(*video.shape[2:])
        posterior = self.model.encode(video.to(self.dtype)).latent_dist
        latents = posterior_latents(
            posterior, do_sample=self.do_sample if do_sample is None else do_sample, generator=generator
        )
        return (latents - self._shift.to(latents)) * self._scale.to(latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents `[B, C, T', h, w]` -> video `[B, 3, T, H, W]` in [-1, 1], at least fp32."""
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        latents = latents / self._scale.to(latents) + self._shift.to(latents)
        video: torch.Tensor = self.model.decode(latents.to(self.dtype)).sample
        return video.to(torch.promote_types(video.dtype, torch.float32))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Reconstruct a video."""
        return self.decode(self.encode(video))


def _build(given: dict[str, Any]) -> AutoencoderKLWan:
    """A network with random weights. Its latents are left as they are unless a mean and a deviation are
    given: the published ones describe the published weights."""
    z_dim = given.get("z_dim", 16)
    fields = {"latents_mean": [0.0] * z_dim, "latents_std": [1.0] * z_dim, **given}
    for name in ("latents_mean", "latents_std"):
        if len(fields[name]) != z_dim:
            raise UserError(f"wan_video_vae: {name} has {len(fields[name])} entries for z_dim {z_dim}")
    patch = given.get("patch_size")
    fields.setdefault("in_channels", 3 * (patch or 1) ** 2)
    fields.setdefault("out_channels", 3 * (patch or 1) ** 2)
    for name in ("in_channels", "out_channels"):
        if fields[name] != 3 * (patch or 1) ** 2:
            raise UserError(
                f"wan_video_vae: {name} {fields[name]} does not fit patch_size {patch}: it must be "
                f"{3 * (patch or 1) ** 2}"
            )
    stages = len(given.get("dim_mult", (1, 2, 4, 4)))
    downsample = given.get("temperal_downsample", (False, True, True))
    if len(downsample) != stages - 1:
        raise UserError(
            f"wan_video_vae: temperal_downsample has {len(downsample)} entries, but dim_mult of {stages} "
            f"stages needs {stages - 1}"
        )
    fields["scale_factor_temporal"] = 2 ** sum(downsample)
    fields["scale_factor_spatial"] = 2 ** (stages - 1) * (patch or 1)
    return AutoencoderKLWan(**fields)


def _tiles(given: Mapping[str, Any], factor: int) -> dict[str, int]:
    """Arguments of upstream's `enable_tiling`.

    Raises:
        UserError: a tile does not begin or end where a latent does: upstream would put it elsewhere, silently.
    """
    tiles = {name: value for name, value in given.items() if name.startswith("tile_sample_")}
    for key, name in (("tile_size", "min"), ("tile_stride", "stride")):
        value = given.get(key)
        if value is not None:
            sides = (value, value) if isinstance(value, int) else value
            tiles |= {
                f"tile_sample_{name}_{side}": n for side, n in zip(("height", "width"), sides, strict=True)
            }
    for name, value in tiles.items():
        if value % factor:
            near = max(1, round(value / factor)) * factor
            raise UserError(
                f"wan_video_vae: {name} {value} of tiling_param is no multiple of {factor}, the pixels of a latent; write {near}"
            )
    return tiles


def _factors(config: Mapping[str, Any]) -> tuple[int, int, int]:
    spatial = 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1)
    return 2 ** sum(config["temperal_downsample"]), spatial, spatial
