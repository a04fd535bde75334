"""The config classes of wan22 against the constructors, and against what users write."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_wan_parts import TINY_WAN

from mm_plugin_wan22.autoencoder import WanVideoVAE
from mm_plugin_wan22.config import (
    WanDiTConfig,
    WanFlowMatchSchedulerConfig,
    WanPipelineConfig,
    WanVideoVAEConfig,
)
from mm_plugin_wan22.pipeline import WanPipeline
from mm_plugin_wan22.predictor import WanDiT
from mm_plugin_wan22.scheduler import WanFlowMatchScheduler

A14B = {
    "model_type": "wan2.2-t2v",
    "patch_size": [1, 2, 2],
    "text_len": 512,
    "in_dim": 16,
    "hidden_size": 5120,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "text_dim": 4096,
    "img_dim": 1280,
    "out_dim": 16,
    "num_heads": 40,
    "num_layers": 40,
    "pipeline_num_layers": [10, 10, 10, 10],
    "qk_norm": True,
    "qk_norm_type": "rmsnorm",
    "cross_attn_norm": True,
    "eps": 1e-6,
    "max_seq_len": 1024,
    "attention_async_offload": False,
    "use_fused_rmsnorm": True,
}


@pytest.mark.parametrize(
    ("config", "component"), [(WanDiTConfig, WanDiT), (WanFlowMatchSchedulerConfig, WanFlowMatchScheduler)]
)
def test_constructors_take_the_effective_fields_with_the_same_defaults(config: Any, component: Any) -> None:
    parameters = inspect.signature(component.__init__).parameters
    effective = config().effective()
    # These do something with some types of model only, or say what is so anyway.
    idle = {"img_dim", "clip_token_len", "seperated_timestep"} & set(parameters)
    assert set(effective) == set(parameters) - {"self"} - idle
    assert {name: parameters[name].default for name in effective} == effective


def test_autoencoder_fields_fit_its_constructor_and_upstreams() -> None:
    from diffusers import AutoencoderKLWan

    effective = set(WanVideoVAEConfig().effective())
    own = set(inspect.signature(WanVideoVAE.__init__).parameters) - {"self", "model", "architecture"}
    upstream = set(inspect.signature(AutoencoderKLWan.__init__).parameters) - {"self"}
    assert own <= effective
    assert effective - own == upstream - {"scale_factor_temporal", "scale_factor_spatial"}


def test_pipeline_fields_fit_its_constructor() -> None:
    effective = WanPipelineConfig(input_size=(5, 32, 32)).effective()
    own = set(inspect.signature(WanPipeline.__init__).parameters)
    assert set(effective) == own - {"self", "model", "tokenizer", "device"}


def test_published_sections_load_and_build() -> None:
    import torch

    config = WanDiTConfig.model_validate(A14B)
    with torch.device("meta"):
        model = WanDiT(**config.effective())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(14.288e9, rel=1e-3)
    WanFlowMatchSchedulerConfig.model_validate(
        {"shift": 5, "sigma_min": 0.0, "extra_one_step": True, "max_timestep_boundary": 0.417}
    )
    WanVideoVAEConfig.model_validate(
        {
            "enable_tiling": False,
            "tiling_param": {"tile_sample_min_height": 256, "tile_sample_stride_height": 192},
            "norm_latents": True,
            "norm_mode": "channel_specified_shift_scale",
            "do_sample": False,
        }
    )
    WanPipelineConfig.model_validate(
        {"input_size": [45, 704, 1280], "vae_scale_factor_spatial": 16, "expand_timesteps": True}
    )


@pytest.mark.parametrize(
    ("cls", "changes", "word"),
    [
        (WanDiTConfig, {"model_type": "v2v"}, "model_type"),
        (WanDiTConfig, {"model_type": "wan2.2-i2v"}, "36 for out_dim 16"),
        (WanDiTConfig, {"model_type": "ti2v", "in_dim": 36}, "in_dim 36 and out_dim 16"),
        (WanDiTConfig, {"model_type": "ti2v", "seperated_timestep": False}, "timestep 0; write true"),
        (WanDiTConfig, {"model_type": "ti2v", "patch_size": [2, 2, 2]}, "one latent frame; write 1"),
        (WanDiTConfig, {"model_type": "i2v", "in_dim": 36, "text_len": 256}, "512 tokens"),
        (WanDiTConfig, {"qk_norm": False}, "always normalises"),
        (WanDiTConfig, {"hidden_size": 100}, "not divisible by num_heads"),
        (WanDiTConfig, {"num_heads": 32}, "even number of at least 6"),
        (WanDiTConfig, {"in_dim": 36}, "in_dim 36 and out_dim 16"),
        (WanDiTConfig, {"patch_size": [2, 2]}, "patch_size"),
        (WanDiTConfig, {"num_layer": 3}, "num_layer"),
        (WanFlowMatchSchedulerConfig, {"expert": "low"}, "has no boundary"),
        (
            WanFlowMatchSchedulerConfig,
            {"boundary": 0.9, "expert": "low", "min_timestep_boundary": 0.1},
            "keep one",
        ),
        (WanFlowMatchSchedulerConfig, {"min_timestep_boundary": 1.0}, "below max_timestep_boundary"),
        (WanFlowMatchSchedulerConfig, {"sigma_min": 0.5, "sigma_max": 0.5}, "below sigma_max"),
        (WanFlowMatchSchedulerConfig, {"inverse_timesteps": True}, "noise to video"),
        (WanVideoVAEConfig, {"tiling_param": {"tile_sample_min_width": 64}}, "leave gaps"),
        (WanVideoVAEConfig, {"temperal_downsample": [True, True, True]}, "at most twice"),
        (WanVideoVAEConfig, {"z_dim": 4, "latents_std": [1.0]}, "z_dim 4"),
        (WanVideoVAEConfig, {"dim_mult": [1, 2], "temperal_downsample": [True, True]}, "needs 1"),
        (WanPipelineConfig, {}, "input_size"),
    ],
)
def test_mistakes_are_named(cls: Any, changes: dict[str, Any], word: str) -> None:
    base = TINY_WAN if cls is WanDiTConfig else {}
    with pytest.raises(ValidationError, match=word):
        cls.model_validate({**base, **changes})
