"""Our WanPipeline against diffusers' with the same tiny weights and noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_wan_parts import TINY_T5, TINY_VAE, TINY_WAN
from torch import nn
from transformers import AutoTokenizer

from mm_core.data.text import PromptTokenizer
from mm_core.models.schedulers import FlowMatchEulerDiscrete, UniPCMultistep
from mm_core.models.sora import SoRAModel
from mm_core.models.text_encoders import UMT5
from mm_core.random import keyed_normal
from mm_plugin_wan22.autoencoder import WanVideoVAE
from mm_plugin_wan22.pipeline import WanPipeline
from mm_plugin_wan22.predictor import WanDiT
from mm_plugin_wan22.scheduler import WanFlowMatchScheduler
from mm_registry.errors import UserError

SIZE = (5, 32, 48)
PROMPTS = ["a red ball rolls over the grass", "two cats"]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SAMPLERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "unipc": (
        lambda: UniPCMultistep(num_inference_steps=5, **FLOW),
        lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    ),
    "euler": (
        lambda: FlowMatchEulerDiscrete(num_inference_steps=5, shift=5.0),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    ),
}


class SigmaGrid(diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler steps on the grid of `wan_flow_match_scheduler`, which it shifts once where its
    own shifts twice.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
        sigmas = torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64)[:-1]
        super().set_timesteps(sigmas=sigmas.tolist(), device=device)


def build(diffusion: Any, experts: int = 1) -> SoRAModel:
    torch.manual_seed(5)
    vae = WanVideoVAE(
        **TINY_VAE,
        latents_mean=[0.02 * i for i in range(16)],
        latents_std=[0.5 + 0.05 * i for i in range(16)],
    )
    predictors = [WanDiT(**TINY_WAN).eval() for _ in range(experts)]
    model = SoRAModel(
        predictor=predictors[0],
        low_noise_predictor=predictors[1] if experts == 2 else None,
        ae=vae,
        text_encoder=UMT5(config=TINY_T5),
        diffusion=diffusion,
    )
    return model.eval()


def theirs(
    model: SoRAModel, tokenizer: Any, scheduler: Any, upstream_wan: Callable[..., nn.Module], **fields: Any
) -> Any:
    def copy(ours: nn.Module | None) -> nn.Module | None:
        if ours is None:
            return None
        module = upstream_wan()
        module.load_state_dict(ours.state_dict(), strict=True)
        return module.eval()

    pipeline = diffusers.WanPipeline(
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


def run_theirs(pipeline: Any, noise: torch.Tensor, **fields: Any) -> torch.Tensor:
    frames = pipeline(
        PROMPTS,
        num_frames=SIZE[0],
        height=SIZE[1],
        width=SIZE[2],
        num_inference_steps=5,
        latents=noise,
        output_type="pt",
        max_sequence_length=16,
        **fields,
    ).frames  # [B, T, 3, H, W] in [0, 1]
    video: torch.Tensor = frames.transpose(1, 2) * 2 - 1
    return video


def noise_for(seed: int) -> torch.Tensor:
    return keyed_normal(seed, "generate", [0, 1], (16, 2, 4, 6))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_frames_equal_diffusers(
    sampler: str, tokenizer_folder: Path, upstream_wan: Callable[..., nn.Module]
) -> None:
    ours, other = SAMPLERS[sampler]
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    model = build(ours())
    pipeline = WanPipeline(model, tokenizer, input_size=SIZE, negative_prompt="old tree")
    video = pipeline(PROMPTS, seed=3, guidance_scale=3.0)
    expected = run_theirs(
        theirs(model, tokenizer, other(), upstream_wan),
        noise_for(3),
        guidance_scale=3.0,
        negative_prompt="old tree",
    )
    assert video.shape == (2, 3, *SIZE)
    assert (video - expected).abs().max() <= 1e-4
    # The picture is not saturated or constant: the comparison says something.
    assert expected.std() > 0.01
    assert (expected.abs() < 0.99).float().mean() > 0.9
    plain = pipeline(PROMPTS, seed=3, guidance_scale=1.0)
    assert (video - plain).abs().max() > 1e-3
    # Left out, it is Wan's own text, as in MindSpeed-MM.
    assert WanPipeline(model, tokenizer, input_size=SIZE).negative_prompt.startswith("色调艳丽")
    assert WanPipeline(model, tokenizer, input_size=SIZE, negative_prompt="").negative_prompt == ""


def test_two_experts_and_their_guidance_equal_diffusers(
    tokenizer_folder: Path, upstream_wan: Callable[..., nn.Module]
) -> None:
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    model = build(UniPCMultistep(num_inference_steps=5, guidance_scale=[4.0, 2.0], **FLOW), experts=2)
    pipeline = WanPipeline(
        model, tokenizer, input_size=SIZE, boundary_ratio=0.8, cpu_offload=True, negative_prompt=""
    )
    steps: list[tuple[int, int]] = []
    video = pipeline(PROMPTS, seed=4, progress=lambda step, total: steps.append((step, total)))
    other = theirs(
        model, tokenizer, diffusers.UniPCMultistepScheduler(**FLOW), upstream_wan, boundary_ratio=0.8
    )
    expected = run_theirs(other, noise_for(4), guidance_scale=4.0, guidance_scale_2=2.0)
    assert (video - expected).abs().max() <= 1e-4
    assert steps == [(i, 5) for i in range(1, 6)]
    other.transformer_2 = other.transformer
    assert (
        run_theirs(other, noise_for(4), guidance_scale=4.0, guidance_scale_2=2.0) - video
    ).abs().max() > 1e-3


def test_training_scheduler_samples_as_diffusers_on_its_grid(
    tokenizer_folder: Path, upstream_wan: Callable[..., nn.Module]
) -> None:
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    model = build(
        WanFlowMatchScheduler(
            shift=5.0, sigma_min=0.0, extra_one_step=True, num_inference_timesteps=5, guidance_scale=2.0
        )
    )
    video = WanPipeline(model, tokenizer, input_size=SIZE, negative_prompt="")(PROMPTS, seed=5)
    expected = run_theirs(
        theirs(model, tokenizer, SigmaGrid(shift=5.0), upstream_wan), noise_for(5), guidance_scale=2.0
    )
    assert (video - expected).abs().max() <= 1e-4


def test_a_video_is_keyed_by_seed_and_index_not_by_its_batch(tokenizer_folder: Path) -> None:
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    pipeline = WanPipeline(build(UniPCMultistep(num_inference_steps=2, **FLOW)), tokenizer, input_size=SIZE)
    together = pipeline(PROMPTS, seed=6, indices=[10, 11])
    alone = pipeline(PROMPTS[1:], seed=6, indices=[11])
    assert (together[1:] - alone).abs().max() < 1e-5
    assert (pipeline(PROMPTS[1:], seed=7, indices=[11]) - alone).abs().max() > 1e-2
    with pytest.raises(ValueError, match="1 indices for 2"):
        pipeline(PROMPTS, indices=[1])


@pytest.mark.parametrize(
    ("diffusion", "experts", "fields", "word"),
    [
        (UniPCMultistep(), 1, {}, "flow_prediction"),
        (UniPCMultistep(**FLOW), 1, {"boundary_ratio": 0.9}, "low_noise_predictor"),
        (UniPCMultistep(**FLOW), 2, {}, "boundary_ratio"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    diffusion: Any, experts: int, fields: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        WanPipeline(build(diffusion, experts), None, input_size=SIZE, **fields)  # type: ignore[arg-type]


def test_wrong_guidance_and_channels_are_refused(tokenizer_folder: Path) -> None:
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    model = build(UniPCMultistep(num_inference_steps=1, **FLOW))
    with pytest.raises(UserError, match="one expert"):
        WanPipeline(model, tokenizer, input_size=SIZE)(PROMPTS, guidance_scale=[4.0, 3.0])
    with pytest.raises(UserError, match="4k"):
        WanPipeline(model, tokenizer, input_size=(6, 32, 48))(PROMPTS)
    model.ae.latent_channels = 48
    with pytest.raises(UserError, match="48 channels"):
        WanPipeline(model, tokenizer, input_size=SIZE)


def test_prompts_that_fill_all_tokens_are_reported(
    tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = PromptTokenizer(tokenizer_folder, max_length=16)
    pipeline = WanPipeline(build(UniPCMultistep(num_inference_steps=1, **FLOW)), tokenizer, input_size=SIZE)
    pipeline(["a ball " * 8])
    assert "all 16 tokens" in caplog.text
    caplog.clear()
    pipeline(["a ball " * 7])
    assert not caplog.text
    pipeline.tokenizer = PromptTokenizer(tokenizer_folder, max_length=17)
    with pytest.raises(UserError, match="text_len 16"):
        pipeline(["a ball"])
