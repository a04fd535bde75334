"""Qwen3-VL's networks as this project builds them: kernels, frozen parts, parameters part by part; against transformers'."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mm_core.config.assemble import Assembly
from mm_core.config.component import ComponentConfig
from mm_core.config.flags import TrainFlags
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.job import draft_training_job
from mm_core.models import kernels
from mm_core.models.factory import build_component, build_model, sharding_policy
from mm_core.models.kernels import Computation, chosen_attention
from mm_core.models.patch_embedding import PatchConv3d, compute_patches_as_linear
from mm_core.models.transformers_model import TransformersModel
from mm_core.sharding import build_plan
from mm_core.sharding.parameters import parameters_text, part_parameters
from mm_core.weights import materialize
from mm_registry import default_manager
from mm_registry.errors import UserError
from tests.tiny_vlm import batch, folder, network_of, tiny_qwen3_vl

IDS = ("qwen3_vl", "qwen3_vl_moe")
SECTIONS = ("vision_encoder", "vision_projector", "text_decoder")
BOTH = pytest.mark.parametrize("moe", [False, True], ids=IDS)
CPU = Computation(torch.device("cpu"))


def component(
    path: Path, *, text: Mapping[str, Any] | None = None, freeze: str = "", **hf: Any
) -> ComponentConfig:
    """What a model file of a tiny network means. `freeze` names sections: vision_encoder, vision_projector, text_decoder."""
    folder(path / "network", chat=False, **hf)
    section = {
        "init_from_hf_path": str(path / "network"),
        "init": "random",
        "image_encoder": {
            name: {"freeze": name in freeze} for name in ("vision_encoder", "vision_projector")
        },
        "text_decoder": {"freeze": "text_decoder" in freeze, **(text or {})},
    }
    (path / "model.json").write_text(json.dumps(section))
    assembly = Assembly(default_manager())
    draft = draft_training_job(TrainFlags(mm_model=str(path / "model.json")), assembly, to_run=False)
    assert not [
        str(f) for f in assembly.findings if f.level == "error" and f.path.startswith(("text_", "image_"))
    ]
    return draft.components["model"]


def loss_and_gradients(network: Any, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss = network(**{k: v for k, v in given.items() if k != "sample_index"}, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


# -- kernels ------------------------------------------------------------------------------------------------------------


@BOTH
def test_patches_as_a_product_of_matrices_are_the_convolution(moe: bool) -> None:
    """The whole model's loss and gradients, images and videos; names and weights stay."""
    given, network = batch("image", "two_images", "video"), network_of(tiny_qwen3_vl(moe))
    wanted, names = loss_and_gradients(network, given), list(network.state_dict())
    weight = network.model.visual.patch_embed.proj.weight
    assert compute_patches_as_linear(network) == ("model.visual.patch_embed.proj",)
    assert isinstance(network.model.visual.patch_embed.proj, PatchConv3d)
    assert network.model.visual.patch_embed.proj.weight is weight
    assert list(network.state_dict()) == names
    found = loss_and_gradients(network, given)
    assert found["model.visual.patch_embed.proj.weight"].abs().max() > 0
    assert_same(found, wanted)
    assert compute_patches_as_linear(network) == ()  # once


def test_a_patch_embedding_reads_whole_patches_only_and_takes_any_dtype() -> None:
    convolution = nn.Conv3d(3, 5, (2, 4, 3), stride=(2, 4, 3), bias=False)
    ours, video = PatchConv3d.of(convolution), torch.randn(2, 3, 5, 9, 8)
    torch.testing.assert_close(ours(video), convolution(video))
    assert ours.bfloat16()(video).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "other",
    [{"padding": 1}, {"stride": 1}, {"groups": 3}, {"dilation": 2}, {"padding": "valid", "groups": 3}],
)
def test_other_convolutions_stay_what_they_are(other: dict[str, Any]) -> None:
    network = nn.Sequential(nn.Conv3d(3, 6, 2, **{"stride": 2, **other}))
    assert compute_patches_as_linear(network) == ()
    assert type(network[0]) is nn.Conv3d


@BOTH
def test_what_computes_is_logged(moe: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = component(tmp_path, moe=moe)
    with caplog.at_level(logging.INFO):
        build_model({"model": part}, device="cpu", where=CPU)
    name = IDS[moe]
    assert f"model ({name}): attention on cpu in fp32 is sdpa" in caplog.text
    assert (
        f"model ({name}): model.visual.patch_embed.proj is computed as a product of matrices" in caplog.text
    )
    assert (f"model ({name}): experts on cpu in fp32 are computed by grouped_mm" in caplog.text) is moe


def test_attention_is_chosen_by_device_dtype_and_packages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cls, parts = type(network_of(tiny_qwen3_vl())), ("text_config", "vision_config")
    gpu = Computation.of(torch.device("cuda"), "bf16")

    def choose(where: Computation | None, **asked: str) -> dict[str, str]:
        return chosen_attention(cls, dict.fromkeys(parts), asked, where, "model (x)")

    everywhere = dict.fromkeys(("", *parts), "sdpa")
    assert choose(CPU) == choose(None) == everywhere
    monkeypatch.setattr(kernels, "has_flash_attention", lambda device: device.type == "cuda")
    assert choose(gpu) == everywhere  # no package
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert choose(gpu) == dict.fromkeys(("", *parts), "flash_attention_2")
    assert choose(Computation.of(torch.device("cuda"), None)) == everywhere  # no kernels for fp32
    with caplog.at_level(logging.INFO):
        assert choose(gpu, vision_config="sdpa")["text_config"] == "flash_attention_2"
    assert (
        "attention on cuda in bf16 is flash_attention_2 in text_config, the rest; sdpa in vision_config"
        in caplog.text
    )
    with pytest.raises(
        UserError,
        match=r"text_config asks for flash_attention_2, which has no kernels for fp32; write param_d",
    ):
        choose(Computation.of(torch.device("cuda"), "fp32"), text_config="flash_attention_2")


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ({}, "grouped_mm"),
        ({"experts_implementation": "auto"}, "grouped_mm"),
        ({"experts_implementation": "eager"}, "eager"),
        ({"experts_implementation": "batched_mm", "attn_implementation": "auto"}, "batched_mm"),
        ({"use_npu_fused_moe": True}, "grouped_mm"),
    ],
)
def test_experts_are_computed_as_the_file_asks(text: dict[str, Any], way: str, tmp_path: Path) -> None:
    part = component(tmp_path, moe=True, text=text)
    network: Any = build_component(part, "meta")
    assert network.config.text_config._experts_implementation == way
    materialize(network, "cpu", 0)
    other = network_of(tiny_qwen3_vl(moe=True), experts_implementation="eager")
    other.load_state_dict(network.state_dict())
    assert_same(loss_and_gradients(network, batch()), loss_and_gradients(other, batch()))


# -- the file -----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "freeze",
    [" ".join(names) for n in range(3) for names in itertools.combinations(SECTIONS, n)],
)
def test_parts_are_frozen_by_structure(freeze: str, moe: bool, tmp_path: Path) -> None:
    """The classes of the modules tell what each parameter belongs to, whatever it is called."""
    network: Any = build_component(component(tmp_path, moe=moe, freeze=freeze), "meta")
    visual = network.model.visual
    merging = [m for m in visual.modules() if type(m).__name__.endswith("PatchMerger")]
    assert len(merging) == 3  # the merger and those of deepstack
    projector = {p for m in merging for p in m.parameters()}
    owners = {
        "vision_projector": projector,
        "vision_encoder": set(visual.parameters()) - projector,
        "text_decoder": {*network.model.language_model.parameters(), *network.lm_head.parameters()},
    }
    assert sum(map(len, owners.values())) == len(list(network.parameters()))
    for name, parameters in owners.items():
        assert {p.requires_grad for p in parameters} == {name not in freeze.split()}


def test_activation_offload_is_what_fsdp2_yaml_does(tmp_path: Path) -> None:
    part = component(tmp_path, text={"activation_offload": True})
    network, policy = build_component(part, "meta"), sharding_policy(part)
    assert policy is not None
    layers = tuple(f"model.language_model.layers.{i}" for i in range(2))
    assert build_plan(network, policy, Fsdp2Config(), "model").offload_activations == layers
    assert build_plan(network, policy, Fsdp2Config(offload_activations=()), "model").offload_activations == ()


def test_dense_layers_among_those_with_experts(tmp_path: Path) -> None:
    """MindSpeed-MM stops at `mlp_only_layers`; they are neither experts nor gates to the policy."""
    part = component(tmp_path, moe=True, layers=4, mlp_only_layers=[1], decoder_sparse_step=2, vision={})
    network, policy = build_component(part, "meta"), sharding_policy(part)
    assert policy is not None
    plan = build_plan(
        network, policy, Fsdp2Config(expert_parallel_size=2, align_fsdp_param_groups=True), "model"
    )
    assert plan.experts == ("model.language_model.layers.3.mlp.experts",)
    assert [path for path in plan.aligned if "gate" in path] == ["model.language_model.layers.3.mlp.gate"]
    materialize(network, "cpu", 0)
    assert loss_and_gradients(network, batch())["loss"].isfinite()


def test_the_name_in_the_file_comes_before_the_folders(tmp_path: Path) -> None:
    """`model_id`, else the first of `architectures` that is an id, else `model_type`."""

    def found(model_id: str | None, architectures: list[str], model_type: str) -> str:
        component(tmp_path)
        config = json.loads((tmp_path / "network/config.json").read_text())
        config |= {"architectures": architectures, "model_type": model_type}
        (tmp_path / "network/config.json").write_text(json.dumps(config))
        data = json.loads((tmp_path / "model.json").read_text())
        (tmp_path / "model.json").write_text(
            json.dumps({**data, **({"model_id": model_id} if model_id else {})})
        )
        assembly = Assembly(default_manager())
        draft = draft_training_job(TrainFlags(mm_model=str(tmp_path / "model.json")), assembly, to_run=False)
        return draft.components["model"].model_id

    assert found(None, ["Qwen3VLForConditionalGeneration"], "qwen3_vl") == "qwen3_vl"
    assert found(None, ["qwen3_vl_moe"], "qwen3_vl") == "qwen3_vl_moe"
    assert found("qwen3_vl", ["qwen3_vl_moe"], "qwen3_vl") == "qwen3_vl"


# -- the table of parameters ----------------------------------------------------------------------------------------------


def test_parameters_are_counted_part_by_part(tmp_path: Path) -> None:
    part = component(tmp_path, moe=True, freeze="vision_encoder")
    model = build_model({"model": part}, device="cpu")
    model.model.model.language_model.layers[0].requires_grad_(False)  # half of a part
    rows = {row.path: row for row in part_parameters(model, {})}
    assert list(rows) == [
        *(f"model.model.visual.{name}" for name in ("patch_embed", "pos_embed", "blocks", "merger", "deepstack_merger_list")),
        *(f"model.model.language_model.{name}" for name in ("embed_tokens", "layers", "norm")),
        "model.lm_head",
    ]  # fmt: skip
    parameters = list(model.parameters())
    assert sum(row.total for row in rows.values()) == sum(p.numel() for p in parameters)
    assert sum(row.trained for row in rows.values()) == sum(p.numel() for p in parameters if p.requires_grad)
    assert rows["model.model.visual.merger"].frozen == 0
    layers = rows["model.model.language_model.layers"]
    assert layers.trained == layers.frozen == layers.total / 2
    text = parameters_text(list(rows.values()))
    assert text.splitlines()[1].split() == ["part", "parameters", "trained", "frozen"]
    assert any(line.split()[:2] == ["model.model.visual.blocks", "22.5k"] for line in text.splitlines())


def test_a_tied_parameter_is_counted_once() -> None:
    model = TransformersModel(network_of(tiny_qwen3_vl(tie_word_embeddings=True)))
    rows = {row.path: row for row in part_parameters(model, {})}
    assert "model.lm_head" not in rows
    assert rows["model.model.language_model.embed_tokens"].total == model.model.lm_head.weight.numel()
