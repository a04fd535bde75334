"""`wandit` with image conditions, of each type, against diffusers' class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_wandit import relative
from tiny_wan_parts import TINY_WAN, TYPES
from torch import nn

from mm_core.config.component import ComponentConfig
from mm_core.config.json_reader import parse_json
from mm_core.sharding.pipeline import StageCall
from mm_core.training.tasks.diffusion import DiffusionTask
from mm_plugin_wan22.autoencoder_config import WanTI2VProcessorConfig
from mm_plugin_wan22.config import WanDiTConfig
from mm_plugin_wan22.predictor import WanDiT
from mm_registry.errors import UserError

Build = Callable[..., nn.Module]
BATCH, SIZES = 2, (3, 4, 6)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def given(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Latents, timestep and prompt; and the conditions of a type."""
    inputs = {
        "latents": torch.randn(BATCH, 16, *SIZES, dtype=torch.float64),
        "timestep": torch.tensor([12.5, 873.25]),
        "prompt": torch.randn(BATCH, TYPES[kind].get("text_len", 16), 24, dtype=torch.float64),
    }
    conditions = {}
    if kind in ("wan2.2-i2v", "i2v", "flf2v"):
        conditions["i2v_vae_feature"] = torch.randn(BATCH, 20, *SIZES, dtype=torch.float64)
    if kind in ("i2v", "flf2v"):
        conditions["clip_feature"] = torch.randn(
            BATCH, 257 if kind == "i2v" else 514, 20, dtype=torch.float64
        )
    if kind == "ti2v":
        conditions["first_frame_latents"] = inputs["latents"][:, :, :1].clone()
    return inputs, conditions


def upstreams(inputs: dict[str, torch.Tensor], conditions: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What upstream's pipelines give the transformer."""
    latents, timestep = inputs["latents"], inputs["timestep"]
    if "i2v_vae_feature" in conditions:
        latents = torch.cat([latents, conditions["i2v_vae_feature"]], 1)
    if "first_frame_latents" in conditions:
        mask = torch.ones(SIZES)
        mask[0] = 0
        timestep = torch.stack([(mask[:, ::2, ::2] * t).flatten() for t in timestep])
    images = conditions.get("clip_feature")
    if images is not None and images.shape[1] == 514:  # first and last image of a sample, one after the other
        images = torch.cat([images[i].view(2, 257, -1) for i in range(BATCH)])
    return {
        "hidden_states": latents,
        "timestep": timestep,
        "encoder_hidden_states": inputs["prompt"],
        "encoder_hidden_states_image": images,
    }


def pair(kind: str, upstream_wan: Build) -> tuple[WanDiT, nn.Module]:
    theirs = upstream_wan(**TYPES[kind]).double()
    if kind == "flf2v":
        nn.init.normal_(theirs.condition_embedder.image_embedder.pos_embed)
    ours = WanDiT(**{**TINY_WAN, **TYPES[kind]}).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("kind", ["wan2.2-i2v", "i2v", "flf2v", "ti2v"])
def test_output_and_every_gradient_equal_upstreams(upstream_wan: Build, kind: str) -> None:
    ours, theirs = pair(kind, upstream_wan)
    inputs, conditions = given(kind)
    target = torch.randn_like(inputs["latents"])
    mine = ours(**inputs, **conditions)
    other = theirs(**upstreams(inputs, conditions), return_dict=False)[0]
    assert relative(mine, other) <= 1e-9
    (mine - target).square().mean().backward()
    (other - target).square().mean().backward()
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert relative(parameter.grad, expected[name].grad) <= 1e-6, name


def test_without_a_first_frame_every_token_has_the_samples_timestep(upstream_wan: Build) -> None:
    ours, theirs = pair("ti2v", upstream_wan)
    inputs, conditions = given("ti2v")
    with torch.no_grad():
        plain = ours(**inputs)
        assert relative(plain, theirs(**upstreams(inputs, {}), return_dict=False)[0]) <= 1e-9
        assert relative(plain, ours(**inputs, **conditions)) > 1e-3
        # Timesteps of a caller's own stay.
        each = inputs["timestep"].unsqueeze(1).repeat(1, 18)
        assert relative(plain, ours(**{**inputs, "timestep": each}, **conditions)) <= 1e-9


@pytest.mark.parametrize("kind", ["wan2.2-i2v", "i2v", "flf2v", "ti2v"])
def test_stages_in_a_row_are_the_whole_model(upstream_wan: Build, kind: str) -> None:
    model = WanDiT(**{**TINY_WAN, **TYPES[kind]}).double()
    inputs, conditions = given(kind)
    with torch.no_grad():
        whole = model(**inputs, **conditions)
        travelling = model(**inputs, **conditions, stage=StageCall(True, False, ("0",)))
        boundary = model.stage_boundary(*inputs.values(), **conditions, dtype=torch.float64)
        assert [t.shape for t in travelling] == [t.shape for t in boundary]
        end = model(**inputs, **conditions, stage=StageCall(False, True, ("1",), travelling))
    assert relative(end, whole) <= 1e-12


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "t2v",
            {"first_frame_latents": torch.zeros(2, 16, 1, 4, 6)},
            "type t2v takes no first_frame_latents",
        ),
        ("wan2.2-i2v", {"i2v_vae_feature": None}, "wan2.2-i2v needs i2v_vae_feature, which ae.i2v_processor"),
        ("wan2.2-i2v", {"i2v_vae_feature": torch.zeros(2, 20, 3, 2, 3)}, r"must be \[2, 20, 3, 4, 6\]"),
        ("i2v", {"clip_feature": None}, "i2v needs clip_feature"),
        (
            "flf2v",
            {"clip_feature": torch.zeros(2, 257, 20)},
            "257 tokens.* 514; give i2v_processor last_frame",
        ),
        ("ti2v", {"first_frame_latents": torch.zeros(2, 16, 2, 4, 6)}, r"must be \[2, 16, 1, 4, 6\]"),
    ],
)
def test_conditions_that_do_not_fit_are_named(kind: str, changes: dict[str, Any], words: str) -> None:
    inputs, conditions = given(kind)
    with pytest.raises(UserError, match=words):
        WanDiT(**{**TINY_WAN, **TYPES[kind]}).double()(**inputs, **{**conditions, **changes})


def test_image_embeddings_know_their_initial_values() -> None:
    model = WanDiT(**{**TINY_WAN, **TYPES["flf2v"]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None and not model.init_module(module):
                module.reset_parameters()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    assert not model.condition_embedder.image_embedder.pos_embed.any()


@pytest.mark.parametrize(
    ("file", "billions"),
    [
        ("wan2.2/5B/ti2v/pretrain_model.json", 4.9998),
        ("wan2.2/A14B/i2v/pretrain_model_low.json", 14.2889),
        ("wan2.1/t2v_1.3B.json", 1.4190),
        ("wan2.1/t2v_14B.json", 14.2885),
        ("wan2.1/i2v_14B.json", 16.3948),
        ("wan2.1/flf2v_14B.json", 16.3955),
    ],
)
def test_published_sizes(file: str, billions: float) -> None:
    section = dict(parse_json((EXAMPLES / file).read_text(), file).data["predictor"])
    for key in ("model_id", "from_pretrained"):
        del section[key]
    with torch.device("meta"):
        model = WanDiT(**WanDiTConfig.model_validate(section).effective())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-4)


@pytest.mark.parametrize("kind", ["t2v", "wan2.2-i2v", "i2v", "flf2v", "ti2v"])
def test_an_example_batch_has_the_conditions_of_the_type(kind: str) -> None:
    """What `mm plan` traces; the forward pass takes it."""
    section = {**TINY_WAN, **TYPES[kind]}
    processor = WanTI2VProcessorConfig() if kind == "ti2v" else None
    clip = {"num_frames": 9, "max_height": 32, "max_width": 48}

    def component(role: str, config: Any, fields: dict[str, Any]) -> ComponentConfig:
        spec: Any = SimpleNamespace(id=role, distribution="mmzoo-plugin-wan22")
        return ComponentConfig(role, role, spec, config, fields)

    components = {
        "predictor": component("predictor", WanDiTConfig.model_validate(section), section),
        "dataset": component("dataset", None, {"preprocess_parameters": clip}),
        **({} if processor is None else {"ae.i2v_processor": component("i2v_processor", processor, {})}),
    }
    inputs = DiffusionTask.example_batch(components, batch_size=2, device="cpu")
    assert inputs.conditions.keys() == {"prompt", "prompt_mask", *given(kind)[1]}
    with torch.no_grad():
        output = WanDiT(**section)(inputs.noised_latents, inputs.timesteps, **inputs.conditions)
    assert output.shape == inputs.latents.shape == (2, 16, 3, 4, 6)
