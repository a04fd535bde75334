"""Folders of experts, as transformers saves them and as the hub has them: what a sharded model loads is what
`from_pretrained` gives.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy
from mm_core.weights import WeightsError, load_hf_folder, materialize
from mm_core.weights.fit import check_fit
from mm_core.weights.mapping import folder_recipes, module_recipes, shapes_of
from mm_core.weights.recipe import inverted, pieces, result_shape, sources
from mm_core.weights.tensors import state_tensors, whole_tensor
from tests.distributed.harness import run_ranks
from tests.distributed.models import MOE, Composite, moe

pytestmark = pytest.mark.timeout(180)
_VISION = ShardingPolicy(
    units=("model.visual.blocks.{*}", "model.language_model.layers.{*}"),
    experts=("model.language_model.layers.{*}.mlp.experts",),
)


def qwen3_vl_moe(intermediate: int = 12) -> nn.Module:
    """Qwen3-VL of 8 experts; with an intermediate size of 16 an expert's gate and up matrices are square together."""
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            },
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": intermediate,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "pad_token_id": None,
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False, image_token_id=60, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip
    return Qwen3VLMoeForConditionalGeneration(config)


def values(module: nn.Module) -> dict[str, Any]:
    """All whole tensors of a module (a collective if it is sharded)."""
    return {
        name: (whole_tensor(t) if hasattr(t, "to_local") else t).detach().numpy().copy()
        for name, t in state_tensors(module).items()
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def rewrite(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a folder's tensors, changed one by one."""
    target.mkdir()
    tensors = {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}
    made: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        made |= {k: t.contiguous().clone() for k, t in change(key, tensor).items()}
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen3-VL with experts: as transformers saves it, and on its side, as the hub has it; one with experts each by itself."""
    root = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    qwen3_vl_moe().save_pretrained(root / "saved", max_shard_size="100KB")
    assert len(list((root / "saved").glob("*.safetensors"))) > 1
    rewrite(
        root / "saved",
        root / "hub",
        lambda key, t: {key: t.transpose(1, 2) if ".mlp.experts." in key else t},
    )
    torch.manual_seed(1)
    per_expert: Any = moe()
    per_expert.to(torch.bfloat16).save_pretrained(root / "per_expert", max_shard_size="60KB")
    return {name: root / name for name in ("saved", "hub", "per_expert")}


def load(folder: Path, make: Any, policy: ShardingPolicy, **fsdp2: Any) -> dict[str, Any]:
    with torch.device("meta"):
        composite = Composite(make(), policy)
    composite.fully_shard(None, Fsdp2Config(**fsdp2))
    materialize(composite.predictor, "cpu", 0, random_init=False)
    load_hf_folder(composite.predictor, folder)
    return values(composite.predictor)


@pytest.mark.parametrize(
    ("world", "fsdp2"),
    [
        pytest.param(1, {}, id="1"),
        pytest.param(2, {"expert_parallel_size": 2}, id="ep-2"),
        pytest.param(3, {}, id="fsdp-3", marks=pytest.mark.slow),
        pytest.param(4, {"expert_parallel_size": 2}, id="ep-2-fsdp-4", marks=pytest.mark.slow),
        pytest.param(
            4, {"expert_parallel_size": 2, "sharding_size": 2}, id="ep-2-hsdp", marks=pytest.mark.slow
        ),
    ],
)
def test_fused_experts(world: int, fsdp2: dict[str, Any], folders: dict[str, Path]) -> None:
    def both() -> list[dict[str, Any]]:
        return [load(folders[name], qwen3_vl_moe, _VISION, **fsdp2) for name in ("saved", "hub")]

    expected = values(Qwen3VLMoeForConditionalGeneration.from_pretrained(folders["hub"], dtype=torch.float32))
    for found in run_ranks(both, world):
        assert all(same(each, expected) for each in found)


@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_experts_each_by_itself(world: int, size: int, folders: dict[str, Path]) -> None:
    folder = folders["per_expert"]
    assert "mlp.experts.7.up_proj" in (folder / "model.safetensors.index.json").read_text()
    expected = values(Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for found in run_ranks(load, world, folder, moe, MOE.policy, expert_parallel_size=size):
        assert same(found, expected)


def test_a_rank_reads_the_experts_that_it_keeps(folders: dict[str, Path]) -> None:
    def run() -> tuple[int, int]:
        with torch.device("meta"):
            composite = Composite(moe(), MOE.policy)
        composite.fully_shard(None, Fsdp2Config(expert_parallel_size=2))
        materialize(composite.predictor, "cpu", 0, random_init=False)
        loaded = load_hf_folder(composite.predictor, folders["per_expert"])
        return loaded.read, loaded.nbytes

    for read, whole in run_ranks(run, 2):
        assert 0.49 * whole < read < 0.52 * whole


@pytest.mark.parametrize("name", ["saved", "hub", "per_expert"])
def test_the_way_back_makes_the_folder_again(name: str, folders: dict[str, Path]) -> None:
    """By the layout that a load remembers, every tensor is what it was."""
    stored = {k: t for file in folders[name].glob("*.safetensors") for k, t in load_file(file).items()}
    module = moe() if name == "per_expert" else qwen3_vl_moe()
    loaded = load_hf_folder(module, folders[name])
    own = state_tensors(module)
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    assert loaded.layout.keys() == stored.keys()
    for key, recipe in loaded.layout.items():
        made = torch.empty(result_shape(recipe, shapes))
        for piece in pieces(recipe, shapes, tuple(slice(0, n) for n in made.shape), made):
            piece.target.copy_(own[piece.key].detach()[piece.box])
        assert torch.equal(made.to(stored[key].dtype), stored[key]), key
    assert set(loaded.dtypes.values()) == {"BF16" if name == "per_expert" else "F32"}


@pytest.mark.parametrize("name", ["saved", "per_expert"])
def test_folders_are_laid_out_as_save_pretrained_does(name: str, folders: dict[str, Path]) -> None:
    with torch.device("meta"):
        module = moe() if name == "per_expert" else qwen3_vl_moe()
    stored = {k: tuple(t.shape) for f in folders[name].glob("*.safetensors") for k, t in load_file(f).items()}
    made = folder_recipes(module, None, shapes_of(module))
    assert {key: result_shape(recipe, shapes_of(module)) for key, recipe in made.items()} == stored
    assert inverted(module_recipes(module, None, stored), stored) == made


def test_a_missing_expert_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = rewrite(
        folders["per_expert"],
        tmp_path / "w",
        lambda key, t: {} if "layers.1.mlp.experts.3.down_proj" in key else {key: t},
    )
    with pytest.raises(WeightsError) as caught:
        load_hf_folder(moe(), folder)
    assert re.search(
        r"shape: model\.layers\.1\.mlp\.experts\.down_proj is \[7, 48, 20\] in the file "
        r"\(model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight and 6 more\), \[8, 48, 20\] in the model",
        str(caught.value),
    )
    with torch.device("meta"):
        fit = check_fit(moe(), folder)
    assert any("down_proj is [7, 48, 20]" in problem for problem in fit.problems)


def test_experts_of_different_shapes(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = rewrite(
        folders["per_expert"],
        tmp_path / "w",
        lambda key, t: {key: t[:-1] if "layers.1.mlp.experts.3.down_proj" in key else t},
    )
    with pytest.raises(
        WeightsError, match=r"experts\.3\.down_proj\.weight is \[47, 20\], and .*must have one shape"
    ):
        load_hf_folder(moe(), folder)


def test_square_experts_are_taken_as_transformers_takes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model: Any = qwen3_vl_moe(16)
    model.save_pretrained(tmp_path)
    other = qwen3_vl_moe(16)
    with caplog.at_level(logging.WARNING):
        load_hf_folder(other, tmp_path)
    assert "gate_up_proj is square" in caplog.text
    assert same(values(other), values(Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path)))


def test_every_source_is_read_once(folders: dict[str, Path]) -> None:
    with torch.device("meta"):
        module = moe()
    stored = {
        k: tuple(t.shape)
        for f in folders["per_expert"].glob("*.safetensors")
        for k, t in load_file(f).items()
    }
    used = [key for recipe in module_recipes(module, None, stored).values() for key in sources(recipe)]
    assert sorted(used) == sorted(stored)
