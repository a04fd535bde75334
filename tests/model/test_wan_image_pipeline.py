"""Videos that begin, or begin and end, with a given frame: our WanPipeline against diffusers' WanImageToVideoPipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_wan_parts import TINY_T5, TINY_VAE, TINY_WAN
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from mm_core.data.text import PromptTokenizer
from mm_core.generation.frames import fitting_size, read_frames
from mm_core.models.schedulers import FlowMatchEulerDiscrete, UniPCMultistep
from mm_core.models.sora import SoRAModel
from mm_core.models.text_encoders import UMT5
from mm_core.random import keyed_normal
from mm_plugin_wan22.autoencoder import WanVideoVAE
from mm_plugin_wan22.i2v_processors import WanI2VProcessor
from mm_plugin_wan22.pipeline import WanPipeline
from mm_plugin_wan22.predictor import WanDiT
from mm_registry.errors import UserError

SIZE = (5, 32, 48)
PROMPTS = ["a red ball rolls over the grass", "two cats"]
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SAMPLERS: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "unipc": (
        lambda **more: UniPCMultistep(num_inference_steps=5, **FLOW, **more),
        lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    ),
    "euler": (
        lambda **more: FlowMatchEulerDiscrete(num_inference_steps=5, shift=5.0, **more),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    ),
}
CHANNELS = {"ti2v": 16, "wan2.2-i2v": 36, "i2v": 36, "flf2v": 36}


def picture(folder: Path, seed: int, size: tuple[int, int] = (40, 60)) -> Path:
    """A smooth picture of (height, width), saved without loss."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    waves = [np.sin((x * a + y * b) / (5 + seed) + seed) for a, b in ((1, 0), (0, 1), (1, 1))]
    path = folder / f"picture-{seed}-{size[0]}x{size[1]}.png"
    Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).round().astype(np.uint8)).save(path)
    return path


def build(kind: str, diffusion: Any, experts: int = 1, processor: Any = None) -> SoRAModel:
    torch.manual_seed(5)
    vae = WanVideoVAE(
        **TINY_VAE,
        latents_mean=[0.02 * i for i in range(16)],
        latents_std=[0.5 + 0.05 * i for i in range(16)],
    )  # do_sample is true: a condition is never drawn
    fields = {**TINY_WAN, "model_type": kind, "in_dim": CHANNELS[kind]}
    if kind in ("i2v", "flf2v"):
        fields |= {"text_len": 512, "img_dim": 16, "clip_token_len": 5}
    predictors = [WanDiT(**fields).eval() for _ in range(experts)]
    for predictor in predictors:
        for parameter in predictor.parameters():
            nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    return SoRAModel(
        predictor=predictors[0],
        low_noise_predictor=predictors[1] if experts == 2 else None,
        ae=vae,
        text_encoder=UMT5(config=TINY_T5),
        diffusion=diffusion,
        i2v_processor=processor,
    ).eval()


def theirs(model: SoRAModel, tokenizer: Any, scheduler: Any, **fields: Any) -> Any:
    def copy(ours: Any) -> Any:
        if ours is None:
            return None
        module = diffusers.WanTransformer3DModel.from_config(dict(ours.config))
        module.load_state_dict(ours.state_dict(), strict=True)
        return module.eval()

    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(tokenizer.folder),
        text_encoder=model.text_encoder.model,
        vae=model.ae.model,
        scheduler=scheduler,
        transformer=copy(model.predictor),
        transformer_2=copy(model.low_noise_predictor),
        **fields,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_theirs(pipeline: Any, image: Path, last: Path | None = None, **fields: Any) -> torch.Tensor:
    frames = pipeline(
        Image.open(image),
        PROMPTS,
        last_image=None if last is None else Image.open(last),
        num_frames=SIZE[0],
        height=SIZE[1],
        width=SIZE[2],
        num_inference_steps=5,
        latents=keyed_normal(3, "generate", [0, 1], (16, 2, 4, 6)),
        output_type="pt",
        max_sequence_length=fields.pop("max_sequence_length", 16),
        **fields,
    ).frames  # [B, T, 3, H, W] in [0, 1]
    video: torch.Tensor = frames.transpose(1, 2) * 2 - 1
    return video


def frames_of(path: Path) -> torch.Tensor:
    return read_frames([str(path)] * len(PROMPTS), SIZE[1:])


@pytest.mark.parametrize("kind", ["ti2v", "wan2.2-i2v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_given_first_frame(kind: str, sampler: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    ours, other = SAMPLERS[sampler]
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    model = build(kind, ours(guidance_scale=3.0))
    pipeline = WanPipeline(model, tokenizer, input_size=SIZE, negative_prompt="old tree")
    image = picture(tmp_path, 1)
    video = pipeline(PROMPTS, seed=3, first_frames=frames_of(image))
    upstream = theirs(model, tokenizer, other(), expand_timesteps=kind == "ti2v")
    expected = run_theirs(upstream, image, guidance_scale=3.0, negative_prompt="old tree")
    assert video.shape == (2, 3, *SIZE)
    assert (video - expected).abs().max() <= 1e-4
    assert expected.std() > 0.01
    assert (expected.abs() < 0.99).float().mean() > 0.9
    assert (
        pipeline(PROMPTS, seed=3, first_frames=frames_of(picture(tmp_path, 2))) - video
    ).abs().max() > 1e-3


def test_the_five_billion_model_without_an_image(tokenizer_folder: Path) -> None:
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    model = build("ti2v", SAMPLERS["unipc"][0](guidance_scale=3.0))
    video = WanPipeline(model, tokenizer, input_size=SIZE, negative_prompt="")(PROMPTS, seed=3)
    upstream = theirs(model, tokenizer, SAMPLERS["unipc"][1](), expand_timesteps=True)
    parts = {name: part for name, part in upstream.components.items() if not name.startswith("image")}
    plain = diffusers.WanPipeline(**parts, expand_timesteps=True)
    plain.set_progress_bar_config(disable=True)
    frames = plain(
        PROMPTS,
        num_frames=SIZE[0], height=SIZE[1], width=SIZE[2], num_inference_steps=5, guidance_scale=3.0,
        latents=keyed_normal(3, "generate", [0, 1], (16, 2, 4, 6)), output_type="pt", max_sequence_length=16,
    ).frames  # fmt: skip
    assert (video - (frames.transpose(1, 2) * 2 - 1)).abs().max() <= 1e-4


@pytest.mark.parametrize("last", [False, True])
def test_two_experts_and_both_ends(last: bool, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    model = build("wan2.2-i2v", SAMPLERS["unipc"][0](guidance_scale=[4.0, 2.0]), experts=2)
    pipeline = WanPipeline(
        model, tokenizer, input_size=SIZE, boundary_ratio=0.9, cpu_offload=True, negative_prompt=""
    )
    first, end = picture(tmp_path, 1), picture(tmp_path, 2) if last else None
    ends = None if end is None else frames_of(end)
    video = pipeline(PROMPTS, seed=3, first_frames=frames_of(first), last_frames=ends)
    upstream = theirs(model, tokenizer, SAMPLERS["unipc"][1](), boundary_ratio=0.9)
    expected = run_theirs(upstream, first, end, guidance_scale=4.0, guidance_scale_2=2.0)
    assert (video - expected).abs().max() <= 1e-4
    upstream.transformer_2 = upstream.transformer
    other = run_theirs(upstream, first, end, guidance_scale=4.0, guidance_scale_2=2.0)
    assert (other - video).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_features_of_clip(kind: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Wan2.1's types. The images have CLIP's own size, where the ways to scale to it do not differ."""
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=512)
    side = 32
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            image_size=side, patch_size=16,
        )
    )  # fmt: skip
    clip.save_pretrained(tmp_path / "clip")
    processor = WanI2VProcessor(image_encoder=str(tmp_path / "clip"))
    model = build(kind, SAMPLERS["unipc"][0](guidance_scale=3.0), processor=processor)
    size = (SIZE[0], side, side)
    first, end = picture(tmp_path, 1, (side, side)), picture(tmp_path, 2, (side, side))
    last = end if kind == "flf2v" else None
    given = {"first_frames": read_frames([str(first)] * 2, size[1:])}
    if last is not None:
        given["last_frames"] = read_frames([str(last)] * 2, size[1:])
    video = WanPipeline(model, tokenizer, input_size=size, negative_prompt="")(PROMPTS, seed=3, **given)
    upstream = theirs(
        model, tokenizer, SAMPLERS["unipc"][1](), image_encoder=clip.eval(),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
    )  # fmt: skip
    frames = upstream(
        Image.open(first), PROMPTS[0],
        last_image=None if last is None else Image.open(last),
        num_frames=size[0], height=side, width=side, num_inference_steps=5, guidance_scale=3.0,
        latents=keyed_normal(3, "generate", [0], (16, 2, 4, 4)), output_type="pt", max_sequence_length=512,
    ).frames  # fmt: skip
    expected = frames.transpose(1, 2) * 2 - 1
    assert (video[:1] - expected).abs().max() <= 1e-4


def test_what_a_type_is_not_given_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    sampler = SAMPLERS["unipc"][0]()
    with pytest.raises(UserError, match="is given the first frame of a video; add --image"):
        WanPipeline(build("wan2.2-i2v", sampler), tokenizer, input_size=SIZE)(PROMPTS)
    frames = frames_of(picture(tmp_path, 1))
    with pytest.raises(UserError, match="first frame only"):
        WanPipeline(build("ti2v", sampler), tokenizer, input_size=SIZE)(
            PROMPTS, first_frames=frames, last_frames=frames
        )
    with pytest.raises(UserError, match="image_encoder"):
        WanPipeline(build("i2v", sampler), tokenizer, input_size=SIZE)(PROMPTS, first_frames=frames)


def test_images_are_scaled_cut_or_decide_the_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(picture(tmp_path, 1, (40, 120)))
    stretched = read_frames([path], (32, 48))
    assert "max_hxw fits the video to it" in caplog.text
    read_frames([path], (32, 64), fitted=True)
    assert "a larger max_hxw comes nearer" in caplog.text
    video_processor = diffusers.video_processor.VideoProcessor(vae_scale_factor=8)
    expected = video_processor.preprocess(Image.open(path), height=32, width=48)
    assert (stretched - expected).abs().max() <= 1e-6
    cut = read_frames([path], (40, 60), crop=True)
    middle = np.asarray(Image.open(path), dtype=np.float32)[:, 30:90] / 127.5 - 1
    assert (cut[0].permute(1, 2, 0) - torch.from_numpy(middle)).abs().max() <= 1e-6
    assert fitting_size(path, 48 * 64, (16, 16)) == (32, 96)
    assert fitting_size(path, 4800, (8, 8)) == (40, 120)
    with pytest.raises(UserError, match="raise max_hxw"):
        fitting_size(path, 100, (16, 16))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="no image that Pillow can read"):
        read_frames([str(tmp_path / "text.png")], (8, 8))
