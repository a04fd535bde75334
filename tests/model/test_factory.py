"""From sections to components and a composed model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_wan_parts import TINY_T5, TINY_VAE, TINY_WAN
from torch import nn

from mm_core.config.component import ComponentConfig
from mm_core.models.factory import build_component, build_sora_model, sharding_policy
from mm_core.models.sora import SoRAModel
from mm_plugin_wan22.autoencoder import WanVideoVAE
from mm_plugin_wan22.config import WanDiTConfig, WanFlowMatchSchedulerConfig, WanVideoVAEConfig
from mm_plugin_wan22.policy import WANDIT
from mm_plugin_wan22.predictor import WanDiT
from mm_plugin_wan22.scheduler import WanFlowMatchScheduler
from mm_registry.errors import UserError
from mm_registry.groups import ROLES
from mm_registry.manager import default_manager


def section(role: str, model_id: str, fields: dict[str, Any], **keys: Any) -> ComponentConfig:
    spec = default_manager().resolve(ROLES[role].name, model_id)
    return ComponentConfig(role, model_id, spec, None, fields, **{"path": (role,), **keys})


PREDICTOR = section("predictor", "wandit", WanDiTConfig(**TINY_WAN).effective(), init="random")
AE = section("ae", "wan_video_vae", WanVideoVAEConfig(**TINY_VAE, do_sample=False).effective(), init="random")
TEXT = section("text_encoder", "UMT5", {"config": TINY_T5}, init="random")
DIFFUSION = section(
    "diffusion", "wan_flow_match_scheduler", WanFlowMatchSchedulerConfig(shift=5.0).effective()
)


def components(**changes: ComponentConfig) -> dict[str, ComponentConfig]:
    return {"predictor": PREDICTOR, "ae": AE, "text_encoder": TEXT, "diffusion": DIFFUSION, **changes}


def test_a_model_is_composed_of_its_sections() -> None:
    model = build_sora_model(components(), device="cpu")
    assert isinstance(model.predictor, WanDiT)
    assert isinstance(model.diffusion, WanFlowMatchScheduler)
    assert all(p.is_meta and p.requires_grad for p in model.predictor.parameters())
    for encoder in (model.ae, model.text_encoder):
        assert not any(p.requires_grad or p.is_meta for p in encoder.parameters())
    assert model.sharding_roots() == {"predictor": WANDIT}
    assert model.low_noise_predictor is None
    assert build_sora_model(components(), device="cpu", with_predictor=False).predictor is None


def test_train_leaves_the_encoders_in_eval_mode_and_eval_works() -> None:
    model = build_sora_model(components(), device="cpu")
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert all(module.training is mode for module in model.predictor.modules())
        assert not any(module.training for module in [*model.ae.modules(), *model.text_encoder.modules()])


def test_random_encoders_are_the_same_everywhere_and_leave_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_component(TEXT)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_component(
        section("text_encoder", "UMT5", {"config": TINY_T5}, init="random", path=("model", "te"))
    )
    third = build_component(
        section("text_encoder", "UMT5", {"config": TINY_T5}, init="random", path=("te", 1))
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert any(not torch.equal(value, third.state_dict()[name]) for name, value in first.state_dict().items())


def test_encoders_get_their_dtype_and_the_model_encodes() -> None:
    model = build_sora_model(
        components(
            text_encoder=section("text_encoder", "UMT5", {"config": TINY_T5}, init="random", dtype="bf16")
        ),
        device="cpu",
    )
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    latents = model.encode_video(video, generators=[torch.Generator(), torch.Generator()])
    assert latents.shape == (2, 16, *model.ae.latent_shape(5, 16, 16))
    assert torch.equal(latents, model.ae.encode(video))
    ids, mask = torch.randint(0, 60, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    embeddings, out_mask = model.encode_text(ids, mask)
    assert isinstance(embeddings, torch.Tensor)
    assert embeddings.dtype is torch.bfloat16
    assert embeddings.shape == (2, 7, 24)
    assert not embeddings.requires_grad
    assert torch.equal(torch.as_tensor(out_mask), mask)


def test_several_text_encoders_are_a_list() -> None:
    other = section("text_encoder", "T5", {"config": TINY_T5}, init="random", path=("text_encoder", 1))
    several = components()
    del several["text_encoder"]
    model = build_sora_model({**several, "text_encoder.0": TEXT, "text_encoder.1": other}, device="cpu")
    assert isinstance(model.text_encoder, nn.ModuleList)
    ids, mask = torch.randint(0, 60, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    embeddings, masks = model.encode_text([ids, ids[:, :4]], [mask, mask[:, :4]])
    assert [e.shape[1] for e in embeddings] == [7, 4]
    assert [m.shape[1] for m in masks] == [7, 4]
    with pytest.raises(UserError, match="2, but the batch brings 1"):
        model.encode_text(ids, mask)


def test_sampling_autoencoders_ask_for_generators() -> None:
    model = SoRAModel(ae=WanVideoVAE(**TINY_VAE))
    video = torch.rand(2, 3, 1, 16, 16)
    with pytest.raises(ValueError, match="generator"):
        model.encode_video(video)

    def draw() -> torch.Tensor:
        return model.encode_video(video, generators=[torch.Generator().manual_seed(i) for i in range(2)])

    assert torch.equal(draw(), draw())


def test_pretrained_encoders_load_in_their_dtype(tmp_path: Path) -> None:
    source = WanVideoVAE(**TINY_VAE)
    source.model.save_pretrained(tmp_path)
    fields = WanVideoVAEConfig(do_sample=False).effective()
    loaded = build_component(
        section("ae", "wan_video_vae", fields, from_pretrained=str(tmp_path), dtype="bf16")
    )
    assert loaded.dtype is torch.bfloat16
    assert not loaded.training
    expected = source.model.encoder.conv_in.weight.bfloat16()
    assert torch.equal(loaded.model.encoder.conv_in.weight, expected)


@pytest.mark.parametrize(
    ("component", "word"),
    [
        (section("ae", "wan_video_vae", {}), "no weights"),
        (section("ae", "wan_video_vae", {}, from_pretrained="/nowhere/vae"), "no folder"),
        (section("ae", "haar_video", {}, from_pretrained="/tmp"), "has no weights"),
        (section("ae", "wan_video_vae", {}, init="random", dtype="bf61"), "bf61"),
        (section("predictor", "wandit", {"depth": 3}), "depth"),
    ],
)
def test_what_cannot_be_built_is_said(component: ComponentConfig, word: str) -> None:
    with pytest.raises(UserError, match=word):
        build_component(component)


def test_a_component_without_weights_needs_none() -> None:
    assert build_component(section("ae", "haar_video", {})).latent_channels == 24


def test_policy_of_a_component_without_one() -> None:
    assert sharding_policy(DIFFUSION) is None
    assert sharding_policy(PREDICTOR) is WANDIT


def test_config_modules_import_no_torch() -> None:
    code = (
        "import sys, mm_plugin_wan22.config, mm_plugin_wan22.policy, mm_core.models.text_encoder_config, "
        "mm_core.models.scheduler_config, mm_core.models, mm_core.generation; "
        "sys.exit(bool({'torch', 'transformers', 'diffusers', 'av'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
