"""What Wan's image processors make, against diffusers' pipeline, and CLIP's features against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_wan_parts import TINY_VAE

from mm_core.models.protocols import I2VProcessor
from mm_plugin_wan22.autoencoder import WanVideoVAE
from mm_plugin_wan22.i2v_processors import WanI2VProcessor, WanTI2VProcessor
from mm_registry.errors import UserError

MEAN = [0.1 * i for i in range(16)]
STD = [0.5 + 0.1 * i for i in range(16)]


def autoencoder(**fields: Any) -> WanVideoVAE:
    torch.manual_seed(1)
    return WanVideoVAE(**{**TINY_VAE, "latents_mean": MEAN, "latents_std": STD, **fields}).eval()


@torch.no_grad()
def upstreams(
    vae: WanVideoVAE, video: torch.Tensor, last: bool, expand_timesteps: bool = False
) -> torch.Tensor:
    """The conditions that upstream's pipeline makes of a video's first (and last) frame."""
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.model,
        scheduler=UniPCMultistepScheduler(),
        expand_timesteps=expand_timesteps,
    )
    _, _, frames, height, width = video.shape
    made = [  # it repeats one image for a batch, so sample by sample
        pipeline.prepare_latents(
            sample[:, :, 0],
            1,
            num_channels_latents=vae.latent_channels,
            height=height,
            width=width,
            num_frames=frames,
            dtype=torch.float32,
            device=torch.device("cpu"),
            last_image=sample[:, :, -1] if last else None,
        )[1]
        for sample in video.split(1)
    ]
    return torch.cat(made)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("frames", [9, 5])
def test_mask_and_latents_are_upstreams(last: bool, frames: int) -> None:
    # The autoencoder draws from its posterior; what is given is not drawn.
    vae, video = autoencoder(do_sample=True), torch.rand(2, 3, frames, 32, 48) * 2 - 1
    processor = WanI2VProcessor(last_frame=last)
    made = processor(vae, video, torch.empty(0), sample_index=torch.tensor([4, 5]))
    assert made.keys() == {"i2v_vae_feature"}
    expected = upstreams(vae, video, last)
    feature = made["i2v_vae_feature"]
    assert feature.shape == expected.shape == (2, 4 + 16, *vae.latent_shape(frames, 32, 48))
    assert (feature - expected).abs().max() <= 5e-6
    given = processor.conditions(vae, video[:, :, 0], frames=frames, last=video[:, :, -1] if last else None)
    assert torch.equal(given["i2v_vae_feature"], feature)


def test_the_first_frame_of_5b_is_upstreams_and_the_first_latent() -> None:
    video = torch.rand(2, 3, 5, 64, 32) * 2 - 1
    fields = {"patch_size": 2, "is_residual": True, "z_dim": 48, "decoder_base_dim": 8}
    norm = {"latents_mean": [0.3] * 48, "latents_std": [2.0] * 48}
    vae = autoencoder(**fields, **norm, do_sample=False)
    made = WanTI2VProcessor(i2v_vae_encode_tiling=False)(vae, video)
    first = made["first_frame_latents"]
    assert made.keys() == {"first_frame_latents"}
    assert first.shape == (2, 48, 1, 4, 2)
    expected = upstreams(vae, video, last=False, expand_timesteps=True)
    assert (first - expected).abs().max() <= 5e-6
    # A causal encoder sees the first frame alone, so that it is given exactly as it is learnt.
    assert (first - vae.encode(video)[:, :, :1]).abs().max() <= 1e-6


def test_a_first_frame_of_its_own_is_what_is_given() -> None:
    vae, video = autoencoder(do_sample=False), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    other = torch.rand(1, 3, 32, 32) * 2 - 1
    made = WanI2VProcessor()(vae, video, None, first_frame=other)
    swapped = torch.cat([other.unsqueeze(2), video[:, :, 1:]], 2)
    assert torch.equal(made["i2v_vae_feature"], WanI2VProcessor()(vae, swapped)["i2v_vae_feature"])
    with pytest.raises(
        UserError, match=r"16 x 32 pixels and the video 32 x 32; train_pipeline.first_frame_vae"
    ):
        WanI2VProcessor()(vae, video, None, first_frame=other[:, :, :16])


def test_tiling_is_the_autoencoders_or_the_processors_own() -> None:
    seen: list[bool] = []

    class Watched(WanVideoVAE):
        def encode(self, *args: Any, **options: Any) -> torch.Tensor:
            seen.append(self.model.use_tiling)
            return super().encode(*args, **options)

    vae = Watched(**TINY_VAE, enable_tiling=True).eval()
    for tiling in ("auto", True, False):
        WanTI2VProcessor(i2v_vae_encode_tiling=tiling)(vae, torch.zeros(1, 3, 1, 32, 32))
    vae.model.use_tiling = False
    for tiling in ("auto", True):
        WanI2VProcessor(i2v_vae_encode_tiling=tiling)(vae, torch.zeros(1, 3, 1, 32, 32))
    assert seen == [True, True, False, False, True]
    assert not vae.model.use_tiling


def test_clip_features_are_the_last_layer_but_one(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    theirs = CLIPVisionModel(config).eval()
    theirs.save_pretrained(tmp_path / "image_encoder")
    processor = WanI2VProcessor(image_encoder=str(tmp_path / "image_encoder"), last_frame=True)
    assert isinstance(processor, I2VProcessor)
    assert not any(p.requires_grad for p in processor.parameters())
    vae, video = autoencoder(do_sample=False), torch.rand(2, 3, 5, 32, 48) * 2 - 1
    made = processor(vae, video)["clip_feature"]

    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    rows = []
    for sample in video:
        tokens = []
        for frame in (sample[:, 0], sample[:, -1]):
            square = F.interpolate(frame[None], (28, 28), mode="bicubic", align_corners=False)[0]
            pixels = ((square + 1) / 2 - mean) / std
            with torch.no_grad():
                tokens.append(theirs(pixels[None], output_hidden_states=True).hidden_states[-2][0])
        rows.append(torch.cat(tokens))
    assert made.shape == (2, 2 * 5, 16)
    assert (made - torch.stack(rows)).abs().max() <= 1e-5
    with pytest.raises(UserError, match="no folder"):
        WanI2VProcessor(image_encoder=str(tmp_path / "clip"))


def test_what_cannot_be_given_is_said() -> None:
    vae, frame = autoencoder(do_sample=False), torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match="at least 2 frames, not 1"):
        WanI2VProcessor().conditions(vae, frame, frames=1, last=frame)
    with pytest.raises(UserError, match="a first frame only, no last one"):
        WanTI2VProcessor().conditions(vae, frame, frames=5, last=frame)
