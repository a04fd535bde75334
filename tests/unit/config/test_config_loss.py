"""How the losses of tokens are weighted: MindSpeed-MM's flags and `loss_cfg` of the model file say one thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config.assemble import Assembly
from mm_core.config.document import read_document
from mm_core.config.findings import Finding
from mm_core.config.flag_parsing import read_command_line
from mm_core.config.job import draft_training_job
from mm_registry import default_manager

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def drafted(folder: Path, *flags: str, **loss: Any) -> tuple[Any, list[Finding]]:
    given = read_document(EXAMPLES / "qwen3vl/8B/model.json").data
    file = folder / "model.json"
    file.write_text(json.dumps({**given, "init": "random", "loss_cfg": loss}))
    assembly = Assembly(default_manager())
    draft = draft_training_job(
        read_command_line(["--mm-model", str(file), *flags])[0], assembly, to_run=False
    )
    fields = draft.components["model"].fields if "model" in draft.components else {}
    return fields.get("loss_cfg"), [f for f in assembly.findings if "calculate" in str(f)]


@pytest.mark.parametrize(
    ("flags", "written", "wanted"),
    [
        ((), None, "default"),
        (("--calculate-per-sample-loss",), None, "per_sample_loss"),
        (("--calculate-square-loss",), None, "square_loss"),
        (("--calculate-per-token-loss",), "token_loss", "token_loss"),  # two names of one thing
        (("--calculate-token-loss", "--calculate-per-token-loss"), None, "per_token_loss"),
        (("--calculate-square-loss",), "square_loss", "square_loss"),
    ],
)
def test_a_flag_is_the_key(flags: tuple[str, ...], written: str | None, wanted: str, tmp_path: Path) -> None:
    section = {} if written is None else {"loss_type": written}
    loss, findings = drafted(tmp_path, *flags, chunk_size=64, compute_mode="chunk", **section)
    assert (loss["loss_type"], loss["compute_mode"], loss["chunk_size"]) == (wanted, "chunk", 64)
    assert not findings


def test_places_that_disagree_are_an_error(tmp_path: Path) -> None:
    _, (finding,) = drafted(tmp_path, "--calculate-square-loss", loss_type="per_sample_loss")
    assert finding.level == "error"
    assert 'it asks for square_loss, but loss_cfg.loss_type is "per_sample_loss"' in str(finding)
    assert "model.json" in str(finding)
    _, (finding,) = drafted(tmp_path, "--calculate-square-loss", "--calculate-per-sample-loss")
    assert finding.level == "error"
    assert "but --calculate-per-sample-loss for per_sample_loss" in str(finding)


def test_a_model_that_learns_no_text_takes_none(tmp_path: Path) -> None:
    file = EXAMPLES / "tiny/wan22-t2v/model.json"
    assembly = Assembly(default_manager())
    flags = read_command_line(["--mm-model", str(file), "--calculate-square-loss"])[0]
    draft_training_job(flags, assembly, to_run=False)
    (finding,) = (f for f in assembly.findings if "calculate" in str(f))
    assert finding.level == "note"
    assert "this model learns none" in finding.message
