"""The transform is exact, orthonormal and says which sizes it cannot take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from mm_plugin_haar.autoencoder import HaarVideoAutoencoder, channel_statistics, haar_basis
from mm_plugin_haar.config import HaarVideoConfig
from mm_registry.errors import UserError

LEVELS = [(0, 0), (1, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_basis_is_orthonormal(size: int) -> None:
    basis = haar_basis(size)
    assert torch.allclose(basis @ basis.T, torch.eye(size, dtype=torch.float64), atol=1e-14)


def test_basis_of_four_is_the_known_one() -> None:
    s = 2**-0.5
    known = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5], [s, -s, 0, 0], [0, 0, s, -s]])
    assert torch.allclose(haar_basis(4), known.double(), atol=1e-15)


@pytest.mark.parametrize(("temporal", "spatial"), LEVELS)
def test_decode_inverts_encode(temporal: int, spatial: int) -> None:
    video = torch.rand(2, 3, 8, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    autoencoder = HaarVideoAutoencoder(temporal_levels=temporal, spatial_levels=spatial)
    latents = autoencoder.encode(video)
    assert latents.shape == (2, autoencoder.latent_channels, *autoencoder.latent_shape(8, 16, 24))
    assert latents.numel() == video.numel()
    assert (autoencoder.decode(latents) - video).abs().max() < 2e-6
    # Orthonormal: lengths are kept.
    assert torch.allclose(latents.square().sum(), video.square().sum(), rtol=1e-5)


def test_first_channel_of_each_colour_is_the_block_mean() -> None:
    video = torch.rand(1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    latents = HaarVideoAutoencoder(temporal_levels=1, spatial_levels=2).encode(video)
    means = video.mean((2, 3, 4)) * (2 * 4 * 4) ** 0.5
    assert torch.allclose(latents[:, ::32, 0, 0, 0], means, atol=1e-6)


def test_normalisation_makes_unit_channels_and_is_undone() -> None:
    video = torch.rand(4, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean, std = channel_statistics([video[:2], video[2:]])
    autoencoder = HaarVideoAutoencoder(latents_mean=mean, latents_std=std)
    latents = autoencoder.encode(video)
    assert torch.allclose(latents.mean((0, 2, 3, 4)), torch.zeros(24), atol=1e-5)
    assert torch.allclose(latents.std((0, 2, 3, 4)), torch.ones(24), atol=1e-4)
    assert (autoencoder.decode(latents) - video).abs().max() < 2e-6


def test_half_precision_video_is_transformed_in_fp32() -> None:
    video = torch.rand(1, 3, 2, 4, 4).bfloat16()
    autoencoder = HaarVideoAutoencoder().to(torch.bfloat16)
    assert autoencoder.encode(video).dtype is torch.float32
    assert (autoencoder(video) - video.float()).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("size", "word"), [((7, 16, 16), "frames 7"), ((8, 15, 16), "height 15"), ((8, 16, 2), "width 2")]
)
def test_sizes_that_do_not_divide_are_named(size: tuple[int, int, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        HaarVideoAutoencoder(temporal_levels=1, spatial_levels=2).encode(torch.zeros(1, 3, *size))


def test_wrong_channel_counts_are_errors() -> None:
    with pytest.raises(UserError, match="24 latent channels"):
        HaarVideoAutoencoder(latents_std=[1.0] * 23)
    with pytest.raises(UserError, match="not 24"):
        HaarVideoAutoencoder().decode(torch.zeros(1, 12, 1, 2, 2))
    with pytest.raises(ValidationError, match="24 latent channels"):
        HaarVideoConfig(latents_mean=[0.0])
    with pytest.raises(ValidationError):
        HaarVideoConfig.model_validate({"latents_std": [1.0] * 23 + [0.0]})


def test_config_needs_no_torch() -> None:
    code = "import sys, mm_plugin_haar.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_it_is_found_by_the_registry() -> None:
    from mm_core import AE_MODEL_MAPPINGS

    assert AE_MODEL_MAPPINGS["haar_video"] is HaarVideoAutoencoder
