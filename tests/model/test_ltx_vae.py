"""`ltx_video_vae` against diffusers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline

from mm_core.models.protocols import AutoEncoder
from mm_plugin_ltx.autoencoder import LTXVideoVAE
from mm_plugin_ltx.config import LTXVideoVAEConfig
from mm_registry.errors import UserError

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": [1, 1, 1, 1, 1],
    "spatio_temporal_scaling": [True, True, True, False],
    "patch_size": 2,
}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}


def video(frames: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, frames, 32, 48, generator=generator) * 2 - 1


def folder_of(path: Path, **changes: Any) -> Path:
    """A folder as diffusers writes it, of a network with a conditioned decoder as in 0.9.5."""
    network = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2, layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False), decoder_spatio_temporal_scaling=(True, False),
        downsample_type=("conv",) * 2, upsample_residual=(False,) * 2, upsample_factor=(1, 1), patch_size=2,
        **{"decoder_inject_noise": (False,) * 3, "scaling_factor": 0.7, **changes},
    )  # fmt: skip
    for name, values in STATISTICS.items():
        getattr(network, name).copy_(torch.tensor(values))
    network.save_pretrained(path)
    return path


def test_latents_and_videos_are_diffusers(record_property: Any) -> None:
    ours = LTXVideoVAE(do_sample=False, scaling_factor=0.7, **TINY, **STATISTICS).eval()
    clip = video()
    mean, std = (torch.tensor(STATISTICS[name]) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        raw = ours.model.encode(clip).latent_dist.mode()
        expected = LTXPipeline._normalize_latents(raw, mean, std, 0.7)
        latents = ours.encode(clip)
        back = LTXPipeline._denormalize_latents(latents, mean, std, 0.7)
        difference = float((ours.decode(latents) - ours.model.decode(back).sample).abs().max())
    record_property("max_abs_difference", difference)
    assert torch.allclose(latents, expected, rtol=0, atol=1e-6)
    assert difference < 1e-6
    assert latents.shape == (2, 4, *ours.latent_shape(9, 32, 48)) == (2, 4, 2, 2, 3)
    assert ours.decode(latents).shape == clip.shape
    assert isinstance(ours, AutoEncoder)


def test_a_published_folder_loads_with_its_statistics_in_fp32(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "vae")
    exact = LTXVideoVAE.from_pretrained(folder, do_sample=False)
    half = LTXVideoVAE.from_pretrained(folder, dtype=torch.bfloat16, do_sample=False)
    assert half.dtype is torch.bfloat16
    assert torch.equal(half._mean, exact._mean)  # bf16 has no 0.1
    assert exact._mean.flatten().tolist() == pytest.approx(STATISTICS["latents_mean"])
    latents, rounded = exact.encode(video()), half.encode(video())
    assert latents.dtype is rounded.dtype is torch.float32
    assert (latents - rounded).abs().max() < 0.1
    with pytest.raises(UserError, match=r"scaling_factor 1\.0"):
        LTXVideoVAE.from_pretrained(folder, scaling_factor=1.0, patch_size=2)
    with pytest.raises(UserError, match="latents_mean"):
        LTXVideoVAE.from_pretrained(folder, latents_mean=[0.0] * 4)


def test_drawing_is_keyed_by_the_sample() -> None:
    vae = LTXVideoVAE(**TINY).eval()
    assert vae.do_sample
    clip = video()

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(2)]

    both = vae.encode(clip, generators())
    assert torch.equal(both, vae.encode(clip, generators()))
    one = vae.encode(clip[1:], generators()[1:])
    assert torch.allclose(both[1:], one, atol=1e-5)
    assert not torch.equal(both, vae.encode(clip, torch.Generator().manual_seed(9)))


def test_a_conditioned_decoder_is_told_its_timestep_and_a_noisy_one_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "conditioned", timestep_conditioning=True)
    vae = LTXVideoVAE.from_pretrained(folder, decode_timestep=0.05, do_sample=False)
    latents = torch.randn(2, 4, 2, 4, 4)
    mean, std = vae.model.latents_mean, vae.model.latents_std
    with torch.no_grad():
        raw = LTXPipeline._denormalize_latents(latents, mean, std, 0.7)
        expected = vae.model.decode(raw, torch.full((2,), 0.05)).sample
        assert torch.allclose(vae.decode(latents), expected, rtol=0, atol=1e-5)
        vae.decode_timestep = 0.5
        assert not torch.allclose(vae.decode(latents), expected, rtol=0, atol=1e-4)
    noisy = LTXVideoVAE.from_pretrained(
        folder_of(tmp_path / "noisy", decoder_inject_noise=(True, False, False))
    )
    assert noisy.encode(video()).shape[1] == 4
    with pytest.raises(UserError, match="decoder_inject_noise"):
        noisy.decode(latents)


@pytest.mark.parametrize(
    ("size", "words"),
    [((8, 32, 32), "8 frames"), ((16, 32, 32), "are 9 and 17"), ((9, 40, 32), "40 x 32"), ((9, 32, 8), "of 16")],
)  # fmt: skip
def test_sizes_that_do_not_divide_are_named_before_and_after_the_build(
    size: tuple[int, int, int], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        LTXVideoVAE(**TINY).latent_shape(*size)
    assert LTXVideoVAEConfig(**TINY).size_problem(*size) is not None


def test_config_and_network_agree_on_sizes() -> None:
    for fields in (TINY, {**TINY, "block_out_channels": [8, 8], "layers_per_block": [1] * 3,
                          "spatio_temporal_scaling": [True, False]}):  # fmt: skip
        config, vae = LTXVideoVAEConfig(**fields), LTXVideoVAE(**fields)
        temporal, spatial = config.factors
        assert vae.factors == (temporal, spatial, spatial)
        assert config.latent_channels == vae.latent_channels
        shape = (2 * temporal + 1, spatial, 2 * spatial)
        assert config.size_problem(*shape) is None
        encoded = vae.encode(torch.zeros(1, 3, *shape))
        assert encoded.shape[2:] == vae.latent_shape(*shape) == (3, 1, 2)
    assert LTXVideoVAEConfig().factors == (8, 32)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"layers_per_block": [1, 1]}, "layers_per_block has 2"), ({"latents_std": [1.0] * 3}, "latents_std has 3"),
     ({"block_out_channels": [8]}, "needs 1")],
)  # fmt: skip
def test_contradictory_architectures_are_errors(changes: dict[str, Any], word: str) -> None:
    fields = {**TINY, **changes}
    if word == "needs 1":
        del fields["layers_per_block"], fields["spatio_temporal_scaling"]
    with pytest.raises(UserError, match=word):
        LTXVideoVAE(**fields)
    with pytest.raises(ValueError, match=word):
        LTXVideoVAEConfig.model_validate(fields)
