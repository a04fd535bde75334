"""`ltx_dit` against diffusers' own class, and inside FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import LTXPipeline, LTXVideoTransformer3DModel

from mm_core.accelerator import Accelerator
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.models.protocols import Predictor
from mm_core.models.sora import SoRAModel
from mm_core.weights import materialize
from mm_plugin_ltx.policy import LTX_DIT
from mm_plugin_ltx.predictor import LTXDiT, pack, unpack
from mm_registry.errors import UserError

TINY: dict[str, Any] = {
    "in_dim": 8,
    "out_dim": 8,
    "num_heads": 2,
    "head_dim": 16,
    "num_layers": 2,
    "text_dim": 12,
    "spatial_compression": 16,
}
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


def upstream(patch: tuple[int, int, int] = (1, 1, 1)) -> LTXVideoTransformer3DModel:
    """diffusers' class of the tiny size, by a mapping written down a second time."""
    return LTXVideoTransformer3DModel(
        in_channels=8 * patch[0] * patch[1] * patch[2],
        out_channels=8 * patch[0] * patch[1] * patch[2],
        patch_size=patch[1],
        patch_size_t=patch[0],
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=12,
    )


def given(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    values = {
        "latents": torch.randn(2, 8, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([12.5, 873.3]),
        "prompt": torch.randn(2, 6, 12, generator=generator),
        "prompt_mask": MASK,
    }
    return {**values, **changes}


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("masked", [True, False])
def test_it_computes_what_diffusers_computes(
    patch: tuple[int, int, int], masked: bool, record_property: Any
) -> None:
    theirs = upstream(patch).eval()
    ours = LTXDiT(**TINY, patch_size=patch).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = given() if masked else given(prompt_mask=None)
    grid = (2 // patch[0], 4 // patch[1], 6 // patch[2])
    tokens = theirs(
        LTXPipeline._pack_latents(inputs["latents"], patch[1], patch[0]),
        inputs["prompt"],
        inputs["timestep"],
        inputs["prompt_mask"],
        *grid,
        rope_interpolation_scale=(8 / 25, 16, 16),
    ).sample
    expected = LTXPipeline._unpack_latents(tokens, *grid, patch[1], patch[0])
    difference = float((ours(**inputs) - expected).detach().abs().max())
    record_property("max_abs_difference", difference)
    assert expected.abs().max() > 0.5
    assert difference == 0.0  # the same operations on the same numbers


def test_a_timestep_for_each_token_is_diffusers_too() -> None:
    theirs, ours = upstream().eval(), LTXDiT(**TINY).eval()
    ours.load_state_dict(theirs.state_dict())
    inputs = given(timestep=torch.linspace(1, 999, 96).view(2, 48))
    tokens = theirs(
        LTXPipeline._pack_latents(inputs["latents"]), inputs["prompt"], inputs["timestep"], MASK,
        2, 4, 6, rope_interpolation_scale=(8 / 25, 16, 16),
    ).sample  # fmt: skip
    assert torch.equal(ours(**inputs), LTXPipeline._unpack_latents(tokens, 2, 4, 6))
    with pytest.raises(ValueError, match=r"\[2\] or \[2, 48\]"):
        ours(**given(timestep=torch.ones(2, 47)))


def test_frame_rate_is_the_sections_or_the_calls() -> None:
    model = LTXDiT(**TINY).eval()
    slow = LTXDiT(**TINY, frame_rate=6.0).eval()
    slow.load_state_dict(model.state_dict())
    default, told = model(**given()), model(**given(), frame_rate=6.0)
    assert torch.equal(told, slow(**given()))
    assert (told - default).abs().max() > 1e-4
    each = model(**given(), frame_rate=torch.tensor([25.0, 6.0]))
    assert torch.allclose(each[:1], default[:1], atol=1e-6)
    assert torch.allclose(each[1:], told[1:], atol=1e-6)


def test_masked_tokens_of_the_prompt_change_nothing() -> None:
    model = LTXDiT(**TINY).eval()
    other = given()
    other["prompt"] = other["prompt"].clone()
    other["prompt"][0, 3:] = 7.0
    assert torch.equal(model(**other), model(**given()))
    other["prompt"][1, 3:] = 7.0
    assert not torch.equal(model(**other)[1], model(**given())[1])


def test_packing_is_undone_and_frames_are_outermost() -> None:
    latents = torch.randn(2, 3, 4, 6, 8)
    tokens = pack(latents, (2, 3, 2))
    assert tokens.shape == (2, 2 * 2 * 4, 3 * 2 * 3 * 2)
    assert torch.equal(unpack(tokens, (2, 2, 4), (2, 3, 2)), latents)
    assert torch.equal(tokens[:, 0], latents[:, :, :2, :3, :2].flatten(1))


def test_the_core_counts_its_tokens_and_diffusers_writes_its_own_config(tmp_path: Any) -> None:
    model = LTXDiT(**TINY, patch_size=(1, 2, 2))
    assert model.patch_size == (1, 2, 2)
    model.save_pretrained(tmp_path)
    again = LTXVideoTransformer3DModel.from_pretrained(tmp_path)
    assert again.config.patch_size == 2
    assert model.check_pretrained_config(again.config) == []
    wrong = {**again.config, "num_attention_heads": 4, "attention_head_dim": 8, "qk_norm": "none"}
    assert model.check_pretrained_config(wrong) == [
        "num_attention_heads is 4 there and 2 here (our num_heads)",
        "attention_head_dim is 8 there and 16 here (our head_dim)",
        "qk_norm is none there and rms_norm_across_heads here",
    ]


@pytest.mark.parametrize(
    ("fields", "changes", "word"),
    [
        ({}, {"latents": torch.zeros(2, 4, 2, 4, 4)}, "in_dim is 8"),
        ({"patch_size": (1, 2, 2)}, {"latents": torch.zeros(2, 8, 2, 4, 5)}, "W=5"),
        ({}, {"prompt": [torch.zeros(2, 6, 12)] * 2}, "one text encoder"),
    ],
)
def test_inputs_that_do_not_fit_are_named(fields: dict[str, Any], changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        LTXDiT(**TINY, **fields)(**given(**changes))


def test_contradictory_sizes_and_unknown_conditions_are_errors() -> None:
    with pytest.raises(UserError, match="num_heads \\* head_dim, 32"):
        LTXDiT(**TINY, cross_attention_dim=64)
    with pytest.raises(UserError, match="rows and columns"):
        LTXDiT(**TINY, patch_size=(1, 2, 1))
    with pytest.raises(TypeError, match="image_latents"):
        LTXDiT(**TINY)(**given(), image_latents=None)


def test_it_is_a_predictor_whose_first_values_are_upstreams() -> None:
    """Built on meta and drawn there, parameters have the spread of those that diffusers draws."""
    with torch.device("meta"):
        model = LTXDiT(**{**TINY, "num_layers": 6})
    assert isinstance(model, Predictor)
    materialize(model, "cpu", 3)
    torch.manual_seed(1)
    theirs = LTXDiT(**{**TINY, "num_layers": 6}).state_dict()
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.isfinite(value).all(), name
        if theirs[name].std() < 1e-6:  # norms start at one
            assert torch.equal(value, theirs[name]), name
        elif value.numel() >= 64:
            assert float(value.std() / theirs[name].std()) == pytest.approx(1.0, abs=0.35), name


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Accelerator("cpu").init_process_group()
    yield
    dist.destroy_process_group()


def sharded(**config: Any) -> SoRAModel:
    with torch.device("meta"):
        predictor = LTXDiT(**TINY)
    model = SoRAModel(predictor=predictor, sharding_policies={"predictor": LTX_DIT})
    model.fully_shard(None, Fsdp2Config(sharding_size="auto", **config))
    materialize(model.predictor, "cpu", 3)
    return model


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        ({"recompute_modules": ["predictor.transformer_blocks.{*}"]}, 0.0),
        ({"param_dtype": "bf16", "reduce_dtype": "fp32"}, 0.03),
        # Lightricks' names, and units that gather their weights after the model looked at them
        ({"param_dtype": "bf16", "sub_modules_to_wrap": ["predictor.patchify_proj", "predictor.adaln_single"]}, 0.03),
    ],
)  # fmt: skip
def test_every_way_of_wrapping_computes_the_same(config: dict[str, Any], tolerance: float) -> None:
    inputs = given(frame_rate=torch.tensor([29.97, 23.976]))
    exact = sharded().predictor(**inputs)
    model = sharded(**config)
    seen: dict[str, torch.Tensor] = {}
    model.predictor.time_embed.register_forward_pre_hook(lambda module, args: seen.update(timestep=args[0]))
    model.predictor.rope.register_forward_hook(lambda module, args, out: seen.update(rope=out[0]))
    output = model.predictor(**inputs)
    output.float().square().mean().backward()
    assert (output.float() - exact).abs().max() <= tolerance * exact.abs().max()
    assert all(p.grad is not None for p in model.predictor.parameters())
    assert torch.equal(seen["timestep"], inputs["timestep"])  # bf16 would make 872 of 873.3
    assert seen["rope"].dtype is torch.float32
