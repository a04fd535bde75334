"""Checkpoints of others, and ours, become folders that diffusers loads, with equal outputs."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mm_core.cli.main import main
from mm_core.config import load_training_job
from mm_core.config.flag_parsing import read_command_line
from mm_core.models.conversion import convert
from mm_core.weights import WeightsError, save_checkpoint
from mm_registry.errors import UserError
from tests.distributed.harness import run_ranks
from tests.e2e.conftest import Job

pytestmark = pytest.mark.timeout(240)

SECTION = {
    "model_id": "wandit", "model_type": "t2v", "text_len": 8, "in_dim": 4, "out_dim": 4, "hidden_size": 24, "num_heads": 2,
    "ffn_dim": 32, "freq_dim": 16, "text_dim": 12, "num_layers": 2, "max_seq_len": 32,
}  # fmt: skip
DIFFUSERS = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
#: diffusers' names -> MindSpeed-MM's, as its converter changes them, in this order.
RENAMES = (
    (r"condition_embedder\.text_embedder", "text_embedding"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"\.scale_shift_table", ".modulation"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"attn2\.add_([kv])_proj", r"attn2.\1_img"),
    (r"attn2\.norm_added_k", "attn2.k_norm_img"),
    (r"(attn\d)\.to_([qkv])\.", r"\1.proj_\2."),
    (r"(attn\d)\.to_out\.0", r"\1.proj_out"),
    (r"(attn\d)\.norm_([qk])\.", r"\1.\2_norm."),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
)


def network(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**DIFFUSERS | changes).eval()


def mindspeed_state(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    state = {}
    for key, tensor in module.state_dict().items():
        for ours, theirs in RENAMES:
            key = re.sub(ours, theirs, key)
        state[prefix + key] = tensor
    assert not [key for key in state if "attn1" in key or "condition_embedder" in key]
    return state


def checkpoint_of(model: dict[str, torch.Tensor]) -> dict[str, Any]:
    """All that Megatron's `generate_state_dict` puts beside the model."""
    return {
        "args": argparse.Namespace(lr=1e-4, params_dtype=torch.bfloat16, iteration=100),
        "checkpoint_version": 3.0,
        "iteration": 100,
        "model": model,
        "optimizer": {
            "state": {0: {"exp_avg": torch.zeros(4), "step": 1}},
            "param_groups": [{"lr": 1e-4, "params": [0]}],
        },
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ],
    }


def model_file(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"predictor": SECTION | changes}))
    return str(path)


def outputs(module: WanTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, module.config.in_channels, 2, 4, 6, generator=generator)
    text = torch.randn(1, 8, 12, generator=generator)
    with torch.no_grad():
        return module(latents, torch.tensor([500.0]), text, return_dict=False)[0]


def as_pt(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    inside = folder / "release" / "mp_rank_00"
    inside.mkdir(parents=True)
    torch.save(checkpoint_of(state), inside / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def as_dcp(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    dcp.save(checkpoint_of(state), checkpoint_id=folder / "iter_0000100", no_dist=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("100\n")
    return folder


def as_sharded_dcp(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """As FSDP saves it: each rank has rows of every tensor."""

    def save() -> None:
        mesh = init_device_mesh("cpu", (2,))
        sharded = {
            name: distribute_tensor(tensor.detach(), mesh, [Shard(0)]) for name, tensor in state.items()
        }
        dcp.save(checkpoint_of(sharded), checkpoint_id=folder / "release")

    run_ranks(save, 2)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("prefix", ["", "predictor."], ids=["bare", "predictor"])
@pytest.mark.parametrize("written", [as_pt, as_dcp, as_sharded_dcp])
def test_checkpoints_of_mindspeed_give_what_diffusers_loads(
    tmp_path: Path, written: Callable[..., Path], prefix: str
) -> None:
    original = network()
    source = written(tmp_path / "source", mindspeed_state(original, prefix))
    done = convert(source, tmp_path / "out", model_file=model_file(tmp_path))
    assert done.tensors == len(original.state_dict())
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in loaded.state_dict().items())
    # Not bit by bit: where a tensor begins in memory decides which kernel multiplies its first elements.
    assert torch.allclose(outputs(loaded), outputs(original), rtol=0, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "out", "source"]


@pytest.mark.parametrize("kind", ["i2v", "flf2v", "wan2.2-i2v"])
def test_image_conditioned_checkpoints_too(tmp_path: Path, kind: str) -> None:
    with_clip: dict[str, Any] = {"image_dim": 1280, "added_kv_proj_dim": 24}
    if kind == "flf2v":
        with_clip["pos_embed_seq_len"] = 514
    original = network(in_channels=12, **(with_clip if kind != "wan2.2-i2v" else {}))
    source = as_pt(tmp_path / "source", mindspeed_state(original))
    section = model_file(tmp_path, model_type=kind, in_dim=12, text_len=512)
    convert(source, tmp_path / "out", model_file=section)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in loaded.state_dict().items())


def run_of(folder: Path, module: torch.nn.Module, **state: Any) -> Path:
    """A run with one checkpoint, and in it the configuration of the tiny example."""
    flags, findings = read_command_line(
        Job().flags("--train-iters", "1", "--micro-batch-size", "1", "--global-batch-size", "1")
    )
    assert not [finding for finding in findings if finding.level == "error"]
    modules = {"predictor": module}
    if "ema" in state:
        modules["ema.predictor"] = state.pop("averages")
    config = load_training_job(flags).resolved()
    save_checkpoint(
        folder, 4, modules, None, {"step": 4, "consumed_samples": 4, "seed": 1, "config": config, **state}
    )
    return folder


@pytest.fixture(scope="module")
def example() -> WanTransformer3DModel:
    """The network of examples/tiny/wan22-t2v."""
    torch.manual_seed(1)
    return WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=24, out_channels=24, text_dim=64, freq_dim=64,
        ffn_dim=256, num_layers=4, rope_max_seq_len=64,
    )  # fmt: skip


def test_a_run_gives_what_diffusers_loads_in_the_dtypes_that_came_in(
    tmp_path: Path, example: WanTransformer3DModel, capsys: pytest.CaptureFixture[str]
) -> None:
    dtypes = {key: "BF16" for key in example.state_dict() if "attn1" in key}
    averages = WanTransformer3DModel.from_config(example.config)
    run = run_of(
        tmp_path / "run", example, weights={"predictor": {"dtypes": dtypes, "layout": {}}}, ema={"decay": 0.9}, averages=averages
    )  # fmt: skip
    words = ["--from", run, "--to", tmp_path / "out", "--max_shard_size", "1MB", "--format", "json"]
    assert main(["convert", *map(str, words)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "a checkpoint of step 4"
    assert said["dtypes"] == {"F32": len(example.state_dict()) - len(dtypes), "BF16": len(dtypes)}
    assert len(said["files"]) > 2
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "out").state_dict()
    for key, value in example.state_dict().items():
        assert torch.equal(loaded[key], value.bfloat16().float() if key in dtypes else value)

    convert(run, tmp_path / "averaged", ema=True, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "averaged" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[key], value.bfloat16()) for key, value in averages.state_dict().items())
    with pytest.raises(UserError, match=r"--component low_noise_predictor: .* has only predictor"):
        convert(run, tmp_path / "none", component="low_noise_predictor")


def test_a_folder_is_copied_in_another_dtype_and_other_files(tmp_path: Path) -> None:
    original = network()
    original.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("a b c")
    (tmp_path / "in" / "evil.py").write_text("raise SystemExit")
    done = convert(
        tmp_path / "in",
        tmp_path / "out",
        dtype=torch.bfloat16,
        max_file_bytes=20_000,
        model_file=model_file(tmp_path),
    )
    assert done.dtypes == {"BF16": done.tensors}
    assert len(done.files) > 1
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[k].float(), v.bfloat16().float()) for k, v in original.state_dict().items())
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a b c"
    assert not (tmp_path / "out" / "evil.py").exists()

    with pytest.raises(WeightsError, match="does not fit predictor"):
        convert(tmp_path / "in", tmp_path / "other", model_file=model_file(tmp_path, num_heads=4))


def test_an_adapters_folder_keeps_what_its_header_says(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file(
        {"lora_A": torch.ones(2)}, tmp_path / "in" / "adapter_model.safetensors", metadata={"rank": "2"}
    )
    (tmp_path / "in" / "adapter_config.json").write_text('{"r": 2, "dtype": "x"}')
    convert(tmp_path / "in", tmp_path / "out", dtype=torch.float16)
    with safe_open(str(tmp_path / "out" / "adapter_model.safetensors"), framework="pt") as opened:
        assert opened.metadata()["rank"] == "2"
        assert opened.get_tensor("lora_A").dtype == torch.float16
    assert (tmp_path / "out" / "adapter_config.json").read_text() == '{"r": 2, "dtype": "x"}'


# -- what cannot be converted


def fails(tmp_path: Path, source: Path, **options: Any) -> str:
    """The message; and nothing is left of the attempt."""
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))
    return str(caught.value)


def test_names_and_shapes_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    state = mindspeed_state(network(), "predictor.")
    del state["predictor.head.head.bias"]
    state["predictor.blocks.0.self_attn.proj_qq.weight"] = torch.zeros(24, 24)
    state["predictor.ffn"] = torch.zeros(3)
    state["predictor.blocks.1.ffn.0.bias"] = torch.zeros(7)
    state["predictor.blocks.1.ffn.2.bias"] = torch.zeros(24, dtype=torch.int64)
    message = fails(
        tmp_path, as_pt(tmp_path / "source", state), model_file=model_file(tmp_path, cross_attn_norm=False)
    )
    for part in (
        "missing: proj_out.bias",
        "unexpected: blocks.0.self_attn.proj_qq.weight",
        "unexpected: blocks.0.norm2.weight",
        "renamed: model.predictor.blocks.0.norm3.weight of the checkpoint is blocks.0.norm2.weight",
        "shape: blocks.1.ffn.net.0.proj.bias is [7] in the checkpoint, [32] in the model",
        "kind: blocks.1.ffn.net.2.bias is torch.int64",
    ):
        assert part in message


def test_values_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    original = network()
    with torch.no_grad():
        original.proj_out.bias[1] = 1e6
        original.proj_out.bias[2] = torch.inf
    original.save_pretrained(tmp_path / "in")
    message = fails(tmp_path, tmp_path / "in", dtype=torch.float16)
    save_file({"a": torch.ones(4).to(torch.float8_e8m0fnu)}, tmp_path / "scales.safetensors")
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales.safetensors").rename(tmp_path / "scales" / "model.safetensors")
    assert convert(tmp_path / "scales", tmp_path / "half", dtype=torch.float16).dtypes == {"F16": 1}
    assert "proj_out.bias has values up to 1e+06, and the largest of F16 is 6.55e+04" in message


def test_sources_that_are_none(tmp_path: Path) -> None:
    file = model_file(tmp_path)
    source = as_pt(tmp_path / "source", mindspeed_state(network()))
    assert "--mm-model model.json" in fails(tmp_path, source)
    assert "averaged weights are read from those only" in fails(tmp_path, source, ema=True, model_file=file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match=r"--to .*full: it exists already"):
        convert(source, tmp_path / "full", model_file=file)
    assert "Closest: " in fails(tmp_path, tmp_path / "sourc", model_file=file)
    assert "there is nothing to convert" in fails(tmp_path, tmp_path / "full", model_file=file)

    weights = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(1)}, weights)
    assert f"name the folder: {tmp_path}" in fails(tmp_path, weights, model_file=file)
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    assert "one file of a checkpoint; name the folder" in fails(tmp_path, tmp_path / "__0_0.distcp")
    assert "is no file of torch.save (a zip archive)" in fails(tmp_path, tmp_path / "model.json")

    (source / "release" / "mp_rank_01").mkdir()
    assert "cut over 2 ranks (mp_rank_00, mp_rank_01)" in fails(tmp_path, source, model_file=file)
    (source / "latest_checkpointed_iteration.txt").write_text("../../etc")
    assert "must be `release` or a number" in fails(tmp_path, source, model_file=file)
    (source / "latest_checkpointed_iteration.txt").write_text("7")
    assert "iter_0000007, which is not there" in fails(tmp_path, source, model_file=file)


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--from", "x", "--too", "y"], "did you mean --to?"),
        (["--from", "x"], "the following arguments are required: --to"),
        (["--from", "x", "--to", "y", "--max-shard-size", "5 apples"], "such as 5GB"),
        (["--from", "x", "--to", "y", "--max-shard-size", "9" * 400], "such as 5GB"),
        (
            ["--from", "x", "--to", "y", "--dtype", "double"],
            "'fp64' is no dtype that is written; did you mean fp",
        ),
        (
            ["--from", "x", "--to", "y", "--dtype", "bf61"],
            "--dtype: 'bf61' is no dtype that is written; did you mean bf16?",
        ),
        (["--from", "x", "--to", "runs/a/checkpoints/iter_7"], "a run would take it for an unfinished"),
        (
            ["--from", "x", "--to", "y", "--dtype", "int8"],
            "'int8' is no dtype that is written; choose from bf16, fp16, fp32",
        ),
        (["--from", "/nowhere/x", "--to", "/nowhere/y"], "--from /nowhere/x: no such folder"),
    ):
        assert main(["convert", *words]) == 2
        assert message in capsys.readouterr().err
