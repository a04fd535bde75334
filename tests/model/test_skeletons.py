"""Networks of diffusers and transformers on the meta device, compared with folders as the libraries write them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from mm_core.models import text_encoders
from mm_core.models.skeleton import collect_skeletons
from mm_plugin_wan22.autoencoder import WanVideoVAE
from mm_registry import UserError

pytestmark = pytest.mark.timeout(120)
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
CLIP = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODERS = [("T5", T5), ("MT5", T5), ("UMT5", T5), ("CLIP", CLIP), ("CLIPWithProjection", CLIP)]
WAN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
}
WAN |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


@pytest.mark.parametrize(("name", "config"), ENCODERS)
def test_what_a_library_writes_fits_its_skeleton(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    cls = getattr(text_encoders, name)
    cls(config=config).model.save_pretrained(tmp_path)
    with collect_skeletons() as fits:
        skeleton = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    (fit,) = fits
    assert fit.problems == ()
    assert fit.tensors > 10
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert skeleton.dtype == torch.bfloat16
    real = cls.from_pretrained(tmp_path)
    assert {k: v.shape for k, v in real.state_dict().items()} == {
        k: v.shape for k, v in skeleton.state_dict().items()
    }


@pytest.mark.parametrize(("name", "config"), ENCODERS)
def test_what_the_library_refuses_does_not_fit(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    cls = getattr(text_encoders, name)
    cls(config=config).model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in state if "final_layer_norm" in key)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with collect_skeletons() as fits:
        cls.from_pretrained(tmp_path)
    assert "lacks 1 of the" in fits[0].problems[0]
    with pytest.raises(UserError, match="lacks weights of"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["CLIP", "CLIPWithProjection"])
def test_the_folder_of_a_whole_model_holds_the_tower(tmp_path: Path, name: str) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=CLIP, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    cls = getattr(text_encoders, name)
    with collect_skeletons() as fits:
        cls.from_pretrained(tmp_path)
    cls.from_pretrained(tmp_path)  # the library takes it
    assert fits[0].problems == ()


def test_an_autoencoder(tmp_path: Path) -> None:
    WanVideoVAE(**WAN).model.save_pretrained(tmp_path)
    with collect_skeletons() as fits:
        skeleton = WanVideoVAE.from_pretrained(tmp_path)
    assert skeleton.latent_channels == 4
    assert fits[0].problems == ()
    with collect_skeletons(), pytest.raises(UserError, match="contradicts its pretrained folder: z_dim 8"):
        WanVideoVAE.from_pretrained(tmp_path, z_dim=8)
    assert not any(parameter.is_meta for parameter in WanVideoVAE.from_pretrained(tmp_path).parameters())


WRONG = [
    "{",
    "[]",
    '{"d_model": "x", "dim_mult": "x"}',
    '{"num_layers": -1, "base_dim": -1}',
    '{"d_model": 0, "z_dim": []}',
]


@pytest.mark.parametrize("config", WRONG)
@pytest.mark.parametrize("cls", [text_encoders.UMT5, WanVideoVAE])
def test_a_config_that_describes_no_network(tmp_path: Path, cls: Any, config: str) -> None:
    WanVideoVAE(**WAN).model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with collect_skeletons() as fits:
        try:
            cls.from_pretrained(tmp_path)
        except UserError:
            return
    assert fits[0].problems


def changed(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize("wrong", [{"d_model": "16"}, {"num_layers": None}, {"num_heads": 2.0}])
def test_wrong_types_in_config_json_are_a_mistake_of_the_user(tmp_path: Path, wrong: dict[str, Any]) -> None:
    text_encoders.UMT5(config=T5).model.save_pretrained(tmp_path)
    changed(tmp_path, **wrong)
    with pytest.raises(UserError, match=f"cannot be loaded from .*'{next(iter(wrong))}' expected int"):
        text_encoders.UMT5.from_pretrained(tmp_path)


@pytest.mark.parametrize("skeleton", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel:layer"},
        {"_attn_implementation_internal": {"": "eager", "text": "somebody/kernel"}},
        {"experts_implementation": "somebody/kernel"},
        {"sub": [{"attn_implementation": "somebody/kernel"}]},
    ],
)
def test_no_code_is_fetched_that_a_config_json_names(
    tmp_path: Path, keys: dict[str, Any], skeleton: bool
) -> None:
    text_encoders.UMT5(config=T5).model.save_pretrained(tmp_path)
    changed(tmp_path, attn_implementation="eager")
    text_encoders.UMT5.from_pretrained(tmp_path)  # a name is none
    changed(tmp_path, **keys)
    with (
        collect_skeletons() if skeleton else nullcontext(),
        pytest.raises(UserError, match=r"asks for 'somebody/kernel.*would be fetched and run"),
    ):
        text_encoders.UMT5.from_pretrained(tmp_path)
