"""LoRA of a diffusion model: MindSpeed-MM's names, a resume, and the folder in diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from mm_core.weights.peft_names import adapter_tensors, base_tensors
from tests.distributed.harness import run_ranks
from tests.distributed.test_resume import outcome, trainer_of

pytestmark = pytest.mark.timeout(120)
LORA = (
    "--lora-target-modules", "proj_q,proj_k,proj_v,proj_out,ffn.0,ffn.2", "--lora-r", "4", "--lora-alpha", "12",
    "--train-iters", "2", "--lr", "1e-2", "--lr-scale-modules", "lora_B:4",
)  # fmt: skip


def in_diffusers(run: Path) -> tuple[Any, Any, dict[str, Any]]:
    """What the trained network predicts, what diffusers does with the folder, and the state after a resumed run."""
    torch.manual_seed(0)
    trainer = trainer_of(run, *LORA, "--save-interval", "1", "--save-hf", "--no-async-save")
    trainer.train(lambda: False)
    whole = outcome(trainer)
    network = trainer.model.predictor.eval()
    assert all(bool(t.any()) for t in adapter_tensors(network).values())
    inputs = {
        "hidden_states": torch.randn(1, 24, 4, 8, 8), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, 64),
    }  # fmt: skip
    plain = WanTransformer3DModel.from_config(network.config).eval()
    plain.load_state_dict({name: t.float() for name, t in base_tensors(network).items()})
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=UniPCMultistepScheduler(), transformer=plain
    )
    pipeline.load_lora_weights(run / "hf/iter_0000002/predictor")
    with torch.no_grad():
        ours = WanTransformer3DModel.forward(network, **inputs, return_dict=False)[0]
        theirs = pipeline.transformer(**inputs, return_dict=False)[0]
        pipeline.disable_lora()
        without = pipeline.transformer(**inputs, return_dict=False)[0]
    assert (theirs - without).abs().max() > 1e-3
    resumed = trainer_of(None, *LORA, "--load", str(run / "checkpoints/iter_0000001"))
    resumed.train(lambda: False)
    after = outcome(resumed)
    changed = {key for key, value in after.items() if value != whole[key]}
    return ours.numpy(), theirs.numpy(), {"changed": changed}


def test_names_resume_and_the_folder_in_diffusers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ((ours, theirs, told),) = run_ranks(in_diffusers, 1, run, timeout=100)
    np.testing.assert_allclose(theirs, ours, atol=2e-6)
    assert told["changed"] == set()
    folder = run / "hf/iter_0000002/predictor"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    names = {
        name.removeprefix("transformer.") for name in load_file(folder / "pytorch_lora_weights.safetensors")
    }
    assert names == {
        f"blocks.{block}.{layer}.lora_{kind}.weight"
        for block in range(4)
        for layer in (
            *(f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")),
            "ffn.net.0.proj", "ffn.net.2",
        )
        for kind in "AB"
    }  # fmt: skip
