"""Sections, hook and weights adapter; what they say agrees with diffusers and with the built network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers
from pydantic import ValidationError

from mm_core.weights import load_hf_folder, save_hf_folder
from mm_plugin_ltx.config import LTXDiTConfig, LTXFlowMatchSchedulerConfig
from mm_plugin_ltx.hooks import overwrite_config
from mm_plugin_ltx.predictor import LTXDiT
from mm_plugin_ltx.weights import LTXWeights, adapter

TINY = {"in_dim": 8, "out_dim": 8, "num_heads": 2, "head_dim": 16, "num_layers": 2, "text_dim": 12}
LIGHT = ["config", "policy", "hooks", "weights", "examples"]


def test_what_a_check_imports_needs_no_torch() -> None:
    imports = ", ".join(f"mm_plugin_ltx.{name}" for name in LIGHT)
    code = f"import sys, {imports}; sys.exit(bool({{'torch', 'diffusers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_defaults_are_the_published_2b_model() -> None:
    config = LTXDiTConfig()
    with torch.device("meta"):
        ours, theirs = LTXDiT(**config.effective()), LTXVideoTransformer3DModel()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ours.check_pretrained_config(theirs.config) == []
    # what the adapter writes is what diffusers reads
    written = dict(adapter(config.effective()).config_to_folder(config.effective()))
    assert written.pop("_class_name") == type(theirs).__name__
    assert written == {name: theirs.config[name] for name in written}
    assert set(written) == {name for name in theirs.config if not name.startswith("_")}


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"cross_attention_dim": 64}, "num_heads \\* head_dim, 2048"),
        ({"patch_size": [1, 2, 1]}, "rows and columns"),
        ({"out_dim": 64}, "in_dim 128 and out_dim 64"),
        ({"num_heads": 1, "head_dim": 7}, "even number"),
        ({"checkpoint_keys": "comfyui"}, "lightricks"),
        ({"hidden_size": 64}, "hidden_size"),
    ],
)
def test_sections_that_mean_nothing_are_refused(section: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        LTXDiTConfig.model_validate(section)
    with pytest.raises(ValidationError, match="base_seq_len 9"):
        LTXFlowMatchSchedulerConfig(base_seq_len=9, max_seq_len=9)


def test_the_hook_fills_what_is_left_out() -> None:
    patch = overwrite_config("predictor", "ltx_dit", {"num_heads": 3, "head_dim": 8})
    assert patch is not None
    assert patch.changes == {"cross_attention_dim": 24}
    assert not patch.required
    filled = LTXDiTConfig.model_validate({"num_heads": 3, "head_dim": 8, **patch.changes})
    assert filled.cross_attention_dim == filled.width
    default = overwrite_config("predictor", "ltx_dit", {})
    assert default is not None
    assert default.changes == {"cross_attention_dim": 2048}
    for role, model_id, section in (
        ("predictor", "ltx_dit", {"cross_attention_dim": 1}),  # the config class says what is wrong
        ("predictor", "ltx_dit", {"num_heads": "two"}),
        ("predictor", "wandit", {}),
        ("ae", "ltx_dit", {}),
    ):
        assert overwrite_config(role, model_id, section) is None


def test_both_spellings_of_the_keys_are_diffusers_converters(tmp_path: Path) -> None:
    model = LTXDiT(**TINY)
    lightricks = LTXWeights("lightricks")
    keys = list(model.state_dict())
    theirs = {lightricks.to_folder(key): key for key in keys}
    assert len(theirs) == len(keys)
    # markers by which diffusers itself knows such a file
    assert "model.diffusion_model.patchify_proj.weight" in theirs
    assert "model.diffusion_model.transformer_blocks.1.attn2.q_norm.weight" in theirs
    assert "model.diffusion_model.adaln_single.emb.timestep_embedder.linear_1.weight" in theirs
    converted = convert_ltx_transformer_checkpoint_to_diffusers(dict(theirs))
    assert converted == {key: key for key in keys}
    for spelling in (list(theirs), [name.removeprefix("model.diffusion_model.") for name in theirs], keys):
        assert [lightricks.to_module(name) for name in spelling] == keys
    assert [LTXWeights().to_folder(key) for key in keys] == keys


@pytest.mark.parametrize("keys", ["diffusers", "lightricks"])
def test_a_folder_is_written_and_read_again(tmp_path: Path, keys: str) -> None:
    fields = LTXDiTConfig.model_validate({**TINY, "checkpoint_keys": keys}).effective()
    names = adapter(fields)
    model, other = LTXDiT(**fields), LTXDiT(**fields)
    folder = save_hf_folder(model, tmp_path / keys, names, names.config_to_folder(fields))
    # A reader need not say which spelling it meets.
    load_hf_folder(other, folder, adapter(LTXDiTConfig.model_validate(TINY).effective()))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    config = json.loads((folder / "config.json").read_text())
    assert names.config_problems(config, fields) == []
    assert names.config_problems({**config, "num_layers": 3}, fields) == ["num_layers is 3 there and 2 here"]
    if keys == "diffusers":
        theirs = LTXVideoTransformer3DModel.from_pretrained(folder)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in theirs.state_dict().items())
