"""What is said of LoRA's flags and keys before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config.assemble import Assembly
from mm_core.config.document import read_document
from mm_core.config.findings import Finding
from mm_core.config.flag_parsing import read_command_line
from mm_core.config.job import TrainingDraft, draft_training_job
from mm_registry import default_manager

ROOT = Path(__file__).resolve().parents[3]
ON = ("--lora-target-modules", "q_proj,v_proj")


def drafted(folder: Path, *flags: str, fsdp2: str = "", **model: Any) -> tuple[TrainingDraft, list[Finding]]:
    given = read_document(ROOT / "examples/qwen3vl/8B/model.json").data
    (folder / "model.json").write_text(json.dumps({**given, "init": "random", **model}))
    (folder / "fsdp2.yaml").write_text(f"sharding_size: auto\n{fsdp2}")
    words = [
        "--mm-model",
        str(folder / "model.json"),
        "--fsdp2-config-path",
        str(folder / "fsdp2.yaml"),
        *flags,
    ]
    assembly = Assembly(default_manager())
    draft = draft_training_job(read_command_line(words)[0], assembly, to_run=False)
    return draft, [f for f in assembly.findings if f.level in ("error", "warning") or "LoRA" in f.message]


def test_flags_and_model_file_make_one_configuration(tmp_path: Path) -> None:
    flags = (*ON, "--lora-r", "4", "--lora-alpha", "8", "--lora-dropout", "0.1")
    draft, _ = drafted(
        tmp_path,
        *flags,
        fsdp2="param_dtype: bf16\n",
        lora_apply_modules=["language_model"],
        lora_mixed_training=True,
    )
    lora = draft.components["model"].lora
    assert lora is not None
    assert (lora.target_modules, lora.rank, lora.alpha, lora.dropout) == (("q_proj", "v_proj"), 4, 8.0, 0.1)
    assert (lora.apply_modules, lora.mixed_training, lora.frozen_dtype) == (("language_model",), True, "bf16")
    assert type(lora).from_json(json.loads(json.dumps(lora.as_json()))).rank == 4


WRONG = {
    "dropout": (
        ("--lora-target-parameters", "mlp.gate.weight", "--lora-dropout", "0.1"), "", {},
        "0.1 cannot be had with --lora-target-parameters",
    ),
    "tensor": ((*ON, "--tensor-model-parallel-size", "2"), "", {}, "layers with adapters cannot be shared in this way"),
    "experts": (
        ("--lora-target-parameters", "mlp.gate.weight"), "expert_parallel_size: 2\n", {},
        "experts are dealt out to 2 ranks, and adapters of parameters need them together",
    ),
    "reentrant": (ON, "use_reentrant: true\n", {}, "under frozen embeddings get no gradients"),
    "mixed": (ON, "", {"lora_mixed_training": True}, "leaves no part without LoRA"),
    "load": ((*ON, "--lora-load", "no/where"), "", {}, '"no/where": there is no such folder'),
    "base alone": (("--load-base-model", "."), "", {}, "LoRA begins with --lora-target-modules"),
    "rank alone": (("--lora-r", "4"), "", {}, "it has no effect: LoRA begins with --lora-target-modules"),
    "key alone": ((), "", {"lora_apply_modules": ["all"]}, '"lora_apply_modules" has no effect: LoRA begins with'),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_said(case: str, tmp_path: Path) -> None:
    flags, fsdp2, model, expected = WRONG[case]
    _, findings = drafted(tmp_path, *flags, fsdp2=fsdp2, **model)
    assert any(expected in finding.message for finding in findings), findings
