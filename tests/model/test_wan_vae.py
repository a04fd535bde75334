"""`wan_video_vae` against diffusers' AutoencoderKLWan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_wan_parts import TINY_VAE

from mm_core.models.protocols import AutoEncoder
from mm_plugin_wan22.autoencoder import WanVideoVAE
from mm_registry.errors import UserError

MEAN = [0.1 * i for i in range(16)]
STD = [0.5 + 0.1 * i for i in range(16)]


@pytest.fixture
def video() -> torch.Tensor:
    return torch.rand(2, 3, 5, 32, 48) * 2 - 1


def tiny(**fields: Any) -> WanVideoVAE:
    torch.manual_seed(1)
    return WanVideoVAE(**{**TINY_VAE, "do_sample": False, **fields}).eval()


@torch.no_grad()
def test_latents_are_normalised_by_channel_and_decoded_back(video: torch.Tensor) -> None:
    vae = tiny(latents_mean=MEAN, latents_std=STD)
    raw = vae.model.encode(video).latent_dist.mode()
    latents = vae.encode(video)
    assert latents.shape == (2, 16, *vae.latent_shape(5, 32, 48)) == (2, 16, 2, 4, 6)
    for channel in range(16):
        expected = (raw[:, channel] - MEAN[channel]) / STD[channel]
        assert torch.allclose(latents[:, channel], expected, atol=1e-6)
    assert torch.allclose(vae.decode(latents), vae.model.decode(raw).sample, atol=1e-5)
    assert torch.allclose(vae(video), vae.decode(latents), atol=1e-6)


@torch.no_grad()
def test_other_norms(video: torch.Tensor) -> None:
    raw = tiny().model.encode(video).latent_dist.mode()
    assert torch.equal(
        tiny().encode(video), raw
    )  # random weights: identity unless a mean and a deviation are given
    assert torch.equal(tiny(norm_latents=False, latents_mean=MEAN, latents_std=STD).encode(video), raw)
    scaled = tiny(norm_mode="value_shift_scale", shift_factor=0.25, scaling_factor=3.0)
    assert torch.allclose(scaled.encode(video), (raw - 0.25) * 3.0, atol=1e-6)
    assert torch.allclose(scaled.decode(scaled.encode(video)), scaled.model.decode(raw).sample, atol=1e-5)
    with pytest.raises(UserError, match="scaling_factor"):
        tiny(norm_mode="value_shift_scale")


@torch.no_grad()
def test_sampling_is_each_samples_own(video: torch.Tensor) -> None:
    vae = tiny(do_sample=True)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(7 + i) for i in range(2)]

    whole = vae.encode(video, generator=generators())
    single = vae.encode(video[1:], generator=generators()[1:])
    posterior = vae.model.encode(video).latent_dist
    assert torch.allclose(whole[1:], single, atol=1e-6)
    assert not torch.allclose(whole, posterior.mode(), atol=1e-3)
    assert ((whole - posterior.mean) / posterior.std).abs().max() < 6


@torch.no_grad()
def test_half_precision_network_has_fp32_latents(video: torch.Tensor) -> None:
    vae = tiny(latents_mean=MEAN, latents_std=STD)
    exact = vae.encode(video)
    vae.to(torch.bfloat16)
    latents = vae.encode(video)
    assert latents.dtype is torch.float32
    assert (latents - exact).abs().max() < 0.1 * exact.abs().max()
    assert vae.decode(latents).dtype is torch.float32


def test_wan22_shape_with_patches() -> None:
    vae = tiny(patch_size=2, is_residual=True, z_dim=48, decoder_base_dim=8)
    assert vae.latent_channels == 48
    assert vae.factors == (4, 16, 16)
    with torch.no_grad():
        latents = vae.encode(torch.rand(1, 3, 5, 32, 32))
        assert latents.shape == (1, 48, *vae.latent_shape(5, 32, 32))
        assert vae.decode(latents).shape == (1, 3, 5, 32, 32)


@torch.no_grad()
def test_tiling_changes_nothing_that_fits_one_tile(video: torch.Tensor) -> None:
    param = {
        "tile_sample_min_height": 64,
        "tile_sample_min_width": 64,
        "tile_sample_stride_height": 48,
        "tile_sample_stride_width": 48,
    }
    tiled = tiny(enable_tiling=True, tiling_param=param)
    assert tiled.model.use_tiling
    assert tiled.model.tile_sample_min_height == 64
    assert torch.equal(tiled.encode(video), tiny().encode(video))
    wide = torch.rand(1, 3, 1, 64, 96)
    assert tiled.encode(wide).shape == tiny().encode(wide).shape
    assert not tiny(tiling_param=param).model.use_tiling


@pytest.mark.parametrize("patch", [None, 2], ids=["factor 8", "factor 16"])
def test_tiles_that_overlap_by_all_that_is_seen_change_next_to_nothing(patch: int | None) -> None:
    # The tiny network sees about 100 pixels; upstream encodes tiles of `patch` times the size that it is told.
    sizes = {"patch_size": patch, "z_dim": 48, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    video = torch.rand(1, 3, 5, 64, 192, generator=torch.Generator().manual_seed(3)) * 2 - 1
    whole = tiny(**sizes)
    tiled = WanVideoVAE(
        whole.model, enable_tiling=False, tiling_param={"tile_size": [64, 64], "tile_stride": [64, 32]}
    )
    expected = whole.encode(video, do_sample=False)
    with tiled.tiled(True):
        found = tiled.encode(video, do_sample=False)
    assert found.shape == expected.shape == (1, 48, 2, 64 // tiled.factors[1], 192 // tiled.factors[2])
    assert not torch.equal(found, expected)
    assert (found - expected).abs().mean() < 0.2 * expected.std()


def test_tiles_must_begin_where_a_latent_does() -> None:
    with pytest.raises(
        UserError, match=r"tile_sample_min_height 100 of tiling_param is no multiple of 8, .*; write 96"
    ):
        tiny(tiling_param={"tile_size": 100, "tile_stride": 64})


@pytest.mark.parametrize(
    ("size", "word"), [((6, 32, 32), "4k"), ((5, 30, 32), "multiple of 8"), ((5, 32, 31), "width")]
)
def test_sizes_that_upstream_would_cut_are_refused(size: tuple[int, int, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        tiny().encode(torch.zeros(1, 3, *size))


def test_pretrained_folder(tmp_path: Path, video: torch.Tensor) -> None:
    source = tiny(latents_mean=MEAN, latents_std=STD)
    source.model.save_pretrained(tmp_path / "vae")
    loaded = WanVideoVAE.from_pretrained(
        tmp_path / "vae", do_sample=False, base_dim=8, dim_mult=[1, 2, 2, 2]
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded.encode(video), source.encode(video))
    half = WanVideoVAE.from_pretrained(tmp_path / "vae", dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    with pytest.raises(UserError, match="base_dim 96"):
        WanVideoVAE.from_pretrained(tmp_path / "vae", base_dim=96)
    with pytest.raises(UserError, match="no folder"):
        WanVideoVAE.from_pretrained(tmp_path / "vea")
    with pytest.raises(UserError, match="inside it has one: vae"):
        WanVideoVAE.from_pretrained(tmp_path)


def test_incomplete_pretrained_folder_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny().model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_in.weight"]
    save_file(weights, file)
    with pytest.raises(UserError, match=r"decoder\.conv_in\.weight"):
        WanVideoVAE.from_pretrained(tmp_path)
    file.rename(tmp_path / "model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        WanVideoVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"norm_mode": "batch"}, "norm_mode"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"temperal_downsample": [True]}, "temperal_downsample"),
        ({"patch_size": 2, "in_channels": 3}, "in_channels 3"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        tiny(**fields)


def test_it_is_an_autoencoder() -> None:
    assert isinstance(tiny(), AutoEncoder)
