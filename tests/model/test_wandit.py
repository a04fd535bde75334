"""`wandit` against diffusers' class, built independently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_wan_parts import TINY_WAN
from torch import nn

from mm_core.models.protocols import Predictor
from mm_plugin_wan22.patch_embedding import LinearPatchEmbedding
from mm_plugin_wan22.policy import wandit
from mm_plugin_wan22.predictor import WanDiT
from mm_registry.errors import UserError

Build = Callable[..., nn.Module]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).detach())


def inputs(batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    return {
        "latents": torch.randn(batch, 16, 3, 4, 6, dtype=torch.float64),
        "timestep": torch.tensor([12.5, 873.25][:batch]),
        "prompt": torch.randn(batch, length, 24, dtype=torch.float64),
    }


@pytest.mark.parametrize("changes", [{}, {"cross_attn_norm": False}, {"patch_size": (1, 1, 2)}])
@pytest.mark.parametrize("per_token", [False, True])
def test_output_and_every_gradient_equal_upstreams(
    upstream_wan: Build, changes: dict[str, Any], per_token: bool
) -> None:
    theirs = upstream_wan(**changes).double()
    ours = WanDiT(**{**TINY_WAN, **changes}).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    given = inputs()
    if per_token:
        tokens = 3 * 4 * 6 // (changes.get("patch_size", (1, 2, 2))[1] * 2)
        given["timestep"] = torch.rand(2, tokens) * 1000

    target = torch.randn_like(given["latents"])
    mine = ours(**given)
    other = theirs(
        hidden_states=given["latents"],
        timestep=given["timestep"],
        encoder_hidden_states=given["prompt"],
        return_dict=False,
    )[0]
    assert mine.dtype is torch.float64
    assert relative(mine, other) <= 1e-6
    (mine - target).square().mean().backward()
    (other - target).square().mean().backward()

    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert expected[name].grad.abs().max() > 0, name
        assert relative(parameter.grad, expected[name].grad) <= 1e-6, name


def test_patch_embedding_is_the_convolution() -> None:
    ours = LinearPatchEmbedding(5, 7, (2, 2, 3)).double()
    conv = nn.Conv3d(5, 7, kernel_size=(2, 2, 3), stride=(2, 2, 3)).double()
    conv.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 5, 4, 6, 9, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = ours(x), conv(y)
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    weight = torch.randn_like(b)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=0, atol=1e-12)
    assert torch.allclose(ours.weight.grad, conv.weight.grad, rtol=0, atol=1e-11)
    assert torch.allclose(ours.bias.grad, conv.bias.grad, rtol=0, atol=1e-11)
    assert torch.autograd.gradcheck(
        ours, (torch.randn(1, 5, 2, 2, 3, dtype=torch.float64, requires_grad=True),)
    )


def test_tokens_of_the_patch_embedding_are_contiguous() -> None:
    embedded = LinearPatchEmbedding(4, 8, (1, 2, 2))(torch.randn(1, 4, 3, 4, 6))
    assert embedded.flatten(2).transpose(1, 2).is_contiguous()


def test_short_prompts_are_zeroed_beyond_the_mask_and_padded(upstream_wan: Build) -> None:
    theirs = upstream_wan().double()
    ours = WanDiT(**TINY_WAN).double()
    ours.load_state_dict(theirs.state_dict())
    given = inputs(length=5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    garbage = given["prompt"].masked_fill(mask.unsqueeze(-1) == 0, float("nan"))
    padded = torch.zeros(2, 16, 24, dtype=torch.float64)
    padded[0, :3], padded[1, :5] = given["prompt"][0, :3], given["prompt"][1, :5]
    with torch.no_grad():
        mine = ours(given["latents"], given["timestep"], garbage, mask)
        other = theirs(given["latents"], given["timestep"], padded, return_dict=False)[0]
        as_list = ours(given["latents"], given["timestep"], [garbage], [mask])
    assert relative(mine, other) <= 1e-6
    assert torch.equal(mine, as_list)


def test_meta_build_then_filled_equals_a_build_in_place() -> None:
    whole = WanDiT(**TINY_WAN)
    with torch.device("meta"):
        empty = WanDiT(**TINY_WAN)
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    empty.to_empty(device="cpu")
    empty.load_state_dict(whole.state_dict(), strict=True)
    empty.reset_buffers("cpu")
    names = [name for name, _ in whole.named_buffers()]
    assert names == [name for name, _ in empty.named_buffers()] != []
    for name, table in whole.named_buffers():
        assert torch.equal(table, empty.get_buffer(name)), name
    assert not any(name.startswith("rope") for name in empty.state_dict())
    given = {key: value.float() for key, value in inputs().items()}
    with torch.no_grad():
        assert torch.equal(whole(**given), empty(**given))


def test_every_module_with_parameters_knows_its_initial_values() -> None:
    """What a sharded model on meta is filled by: `init_module`, else `reset_parameters`; distributions
    are upstream's.
    """
    reference, model = WanDiT(**TINY_WAN), WanDiT(**TINY_WAN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None and not model.init_module(module):
                module.reset_parameters()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        ours, theirs = ours.detach(), theirs.detach()
        assert ours.isfinite().all(), name
        assert abs(float(ours.mean() - theirs.mean())) <= 10 * float(theirs.std()) / ours.numel() ** 0.5, name
        if ours.numel() > 500:
            assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.15), name


def test_state_dict_keys_and_shapes_are_upstreams(upstream_wan: Build) -> None:
    theirs, ours = upstream_wan().state_dict(), WanDiT(**TINY_WAN).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert list(ours) == list(theirs)


def test_an_upstream_folder_loads_if_its_config_agrees(upstream_wan: Build, tmp_path: Path) -> None:
    from mm_core.models.pretrained import load_predictor_folder

    theirs = upstream_wan()
    theirs.save_pretrained(tmp_path)
    ours = WanDiT(**{**TINY_WAN, "max_seq_len": 32})
    load_predictor_folder(ours, tmp_path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    # The same shapes, another network: only config.json tells.
    with pytest.raises(UserError, match=r"num_attention_heads is 3 there and 6 here \(our num_heads\)"):
        load_predictor_folder(WanDiT(**{**TINY_WAN, "num_heads": 6}), tmp_path)
    with pytest.raises(UserError, match="eps"):
        load_predictor_folder(WanDiT(**TINY_WAN, eps=1e-5), tmp_path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "i2v"}, "i2v"),
        ({"qk_norm": False}, "qk_norm"),
        ({"qk_norm_type": "layernorm"}, "rmsnorm"),
        ({"hidden_size": 100}, "hidden_size 100"),
    ],
)
def test_what_it_does_not_compute_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        WanDiT(**{**TINY_WAN, **changes})


@pytest.mark.parametrize(
    ("shape", "length", "word"),
    [
        ((1, 24, 1, 4, 4), 4, "24 channels"),
        ((1, 16, 1, 5, 4), 4, "H=5"),
        ((1, 16, 65, 2, 2), 4, "max_seq_len"),
        ((1, 16, 1, 2, 2), 17, "text_len"),
    ],
)
def test_sizes_that_do_not_fit_are_named(shape: tuple[int, ...], length: int, word: str) -> None:
    with pytest.raises(UserError, match=word):
        WanDiT(**TINY_WAN)(torch.randn(shape), torch.tensor([1.0]), torch.randn(1, length, 24))


def test_unknown_conditions_and_several_encoders_are_errors() -> None:
    model = WanDiT(**TINY_WAN)
    latents, timestep, prompt = torch.randn(1, 16, 1, 2, 2), torch.tensor([1.0]), torch.randn(1, 4, 24)
    with pytest.raises(TypeError, match="first_frame"):
        model(latents, timestep, prompt, first_frame=latents)
    with pytest.raises(UserError, match="one text encoder"):
        model(latents, timestep, [prompt, prompt])


def test_bf16_parameters_keep_the_rotary_tables_and_the_timestep_exact() -> None:
    from mm_core.models.precision import cast_parameters

    exact = WanDiT(**TINY_WAN)
    half = WanDiT(**TINY_WAN)
    half.load_state_dict(exact.state_dict())
    cast_parameters(half, torch.bfloat16)
    assert half.rope.freqs_cos.dtype is torch.float32
    assert half.blocks[0].attn1.to_q.weight.dtype is torch.bfloat16
    assert half.condition_embedder.time_embedder.linear_1.weight.dtype is torch.float32
    given = {key: value.float() for key, value in inputs().items()}
    with torch.no_grad():
        out, expected = half(**given), exact(**given)
    assert out.dtype is torch.bfloat16
    assert relative(out.float(), expected) < 0.05


@pytest.mark.parametrize("changes", [{}, {"model_type": "i2v", "in_dim": 36, "text_len": 512}])
def test_policy_names_modules_that_exist(changes: dict[str, Any]) -> None:
    section = {**TINY_WAN, **changes}
    policy = wandit(section)
    with torch.device("meta"):
        paths = {name for name, _ in WanDiT(**section).named_modules()}
    for pattern in [*policy.units, *policy.aligned, *policy.aliases.values()]:
        assert pattern.replace("{*}", "0") in paths, pattern
    assert not {alias.replace("{*}", "0") for alias in policy.aliases} & paths


def test_it_is_a_predictor() -> None:
    assert isinstance(WanDiT(**TINY_WAN), Predictor)
