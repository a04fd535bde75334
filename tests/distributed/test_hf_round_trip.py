"""A Hugging Face folder, loaded into a sharded module and written again, is the same: each tensor byte for byte, and what
the libraries' `from_pretrained` makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.models.sora import EXPERTS, SoRAModel
from mm_core.sharding import ShardingPolicy
from mm_core.training.export import Exported, export
from mm_core.weights import StateDictAdapter, load_hf_folder, materialize, save_hf_folder
from mm_core.weights.headers import read_header
from mm_core.weights.library_config import library_config
from mm_core.weights.stored import StoredWeights
from mm_plugin_wan22 import policy
from mm_plugin_wan22.config import WanDiTConfig
from mm_plugin_wan22.predictor import WanDiT
from mm_plugin_wan22.weights import WanDiTWeights
from tests.distributed.harness import run_ranks
from tests.distributed.models import MOE, Composite
from tests.distributed.tiny import SIZES

pytestmark = pytest.mark.timeout(180)

WANDIT: dict[str, Any] = {
    "hidden_size": 48, "num_heads": 2, "ffn_dim": 96, "freq_dim": 32, "text_dim": 32, "text_len": 6, "num_layers": 3,
    "in_dim": 4, "out_dim": 4, "max_seq_len": 16,
}  # fmt: skip
VAE: dict[str, Any] = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2], "mrope_interleaved": True},
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
# No side of an expert's matrix is as long as another: transformers tells them apart by their lengths.
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Case:
    """A model of a library, its class here, and what it computes.

    Attributes:
        library: the class that `from_pretrained` is called on, and that writes the folder.
        make: the module here, on the current default device.
        adapted: gives the folder's names and config.json; None for the library's own.
        policy: its sharding; experts of it are spread over the ranks.
        changed: what is done to the folder's tensors, so that it is laid out as published ones are.
    """

    library: Any
    make: Callable[[], nn.Module]
    outputs: Callable[[Any], torch.Tensor]
    adapted: StateDictAdapter | None = None
    policy: ShardingPolicy = ShardingPolicy()  # noqa: RUF009 - it is frozen
    changed: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None


def _video() -> torch.Tensor:
    return torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def _wan(model: Any) -> torch.Tensor:
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    return model(_video(), torch.tensor([500.0]), text, return_dict=False)[0]


def _tokens(model: Any) -> torch.Tensor:
    output = model(input_ids=torch.arange(10).view(1, 10))
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def _qwen(moe: bool) -> nn.Module:
    common: dict[str, Any] = {"vision_config": VISION, "tie_word_embeddings": not moe}
    if not moe:
        config = Qwen3VLConfig(text_config={**TEXT, "tie_word_embeddings": True}, **common)
        return Qwen3VLForConditionalGeneration(config)
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config={**TEXT, **MIXTURE}, **common))


def _on_their_side(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as in the published folders of Qwen3-VL; transformers writes them otherwise than it reads them."""
    return {
        key: tensor.transpose(1, 2).contiguous() if ".experts." in key else tensor
        for key, tensor in tensors.items()
    }


_QWEN = ShardingPolicy(experts=("model.language_model.layers.{*}.mlp.experts",))
CASES = {
    "wandit": Case(WanTransformer3DModel, lambda: WanDiT(**WANDIT), _wan, WanDiTWeights()),
    "vae": Case(
        AutoencoderKLWan,
        lambda: AutoencoderKLWan(**VAE),
        lambda model: model.encode(_video()[:, :3, :1].float()).latent_dist.mode(),
    ),
    "umt5": Case(
        UMT5EncoderModel,
        lambda: UMT5EncoderModel(
            UMT5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
        _tokens,
    ),
    "qwen3vl": Case(Qwen3VLForConditionalGeneration, lambda: _qwen(moe=False), _tokens),
    "qwen3vl-moe": Case(Qwen3VLMoeForConditionalGeneration, lambda: _qwen(moe=True), _tokens),
    "qwen3vl-moe-published": Case(
        Qwen3VLMoeForConditionalGeneration, lambda: _qwen(moe=True), _tokens, None, _QWEN, _on_their_side
    ),
    "qwen3-moe": Case(Qwen3MoeForCausalLM, MOE.make, _tokens, None, MOE.policy),  # a tensor for each expert
}


def folder_of(case: Case, folder: Path, seed: int = 0) -> Path:
    """A folder as the library writes it, in several files, matrices in bf16 and the rest in fp32."""
    torch.manual_seed(seed)
    source = case.library(**SIZES) if case.library is WanTransformer3DModel else case.make()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.2)
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
    source.save_pretrained(folder, max_shard_size="10KB")
    if case.changed is not None:
        for file in folder.glob("*.safetensors"):
            save_file(case.changed(load_file(file)), file, metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor of a folder."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in folder.glob("*.safetensors"):
        header = read_header(file)
        for name, tensor in load_file(file).items():
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = (header[name].dtype, header[name].shape, data)
    return found


def through(case: Case, folder: Path, out: Path) -> None:
    """Load a folder into the sharded module, and write it again."""
    with torch.device("meta"):
        model = Composite(case.make(), case.policy)
    spread = dist.get_world_size() if case.policy.experts else 1
    model.fully_shard(None, Fsdp2Config(expert_parallel_size=spread))
    module = model.predictor
    materialize(module, "cpu", 0, random_init=False)
    loaded = load_hf_folder(module, folder, case.adapted)
    fields = WanDiTConfig.model_validate(WANDIT).effective()
    config = case.adapted.config_to_folder(fields) if case.adapted else library_config(module, loaded.dtypes)
    save_hf_folder(
        module, out, case.adapted, config, dtypes=loaded.dtypes, layout=loaded.layout, max_file_bytes=10_000
    )


def computed(case: Case, folder: Path) -> torch.Tensor:
    """What the library's own class computes with a folder, in fp32."""
    model, info = case.library.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        output: torch.Tensor = case.outputs(model.float().eval())
    return output


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "qwen3vl-moe" else ()) for name in CASES]
)
def test_a_folder_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = folder_of(case, tmp_path / "in")
    before = tensors_of(folder)
    assert {dtype for dtype, _, _ in before.values()} == {"BF16", "F32"}
    for world in (1, 2):
        run_ranks(through, world, case, folder, tmp_path / f"out-{world}")
        after = tensors_of(tmp_path / f"out-{world}")
        assert after.keys() == before.keys()
        assert [key for key in before if before[key] != after[key]] == []
    out = tmp_path / "out-2"
    assert len(list(out.glob("*.safetensors"))) > 1
    assert torch.equal(computed(case, folder), computed(case, out))
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    theirs.pop("_diffusers_version", None)  # not told by an adapter
    assert {key: (value, ours.get(key)) for key, value in theirs.items() if ours.get(key) != value} == {}


def test_both_experts_come_back_side_by_side(tmp_path: Path) -> None:
    case = CASES["wandit"]
    folders = {name: folder_of(case, tmp_path / name, seed) for seed, name in enumerate(EXPERTS)}

    def both() -> None:
        with torch.device("meta"):
            experts = {name: WanDiT(**WANDIT) for name in EXPERTS}
        model = SoRAModel(**experts, sharding_policies=dict.fromkeys(EXPERTS, policy.WANDIT))
        model.fully_shard(None, Fsdp2Config())
        exported = {}
        for name, module in experts.items():
            materialize(module, "cpu", 0, random_init=False)
            loaded = load_hf_folder(module, folders[name], case.adapted)
            exported[name] = Exported(module, None, StoredWeights(loaded.dtypes, loaded.layout))
        export(tmp_path / "run", 12, exported)

    run_ranks(both, 2)
    for name, folder in folders.items():
        written = tmp_path / "run" / "hf" / "iter_0000012" / name
        assert tensors_of(written) == tensors_of(folder)
        assert torch.equal(computed(case, written), computed(case, folder))
    one, other = (tensors_of(folder) for folder in folders.values())
    assert one.keys() == other.keys()
    assert one != other
