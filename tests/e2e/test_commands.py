"""`mm list`, `mm check`, help, and what importing costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ENVIRONMENT, ROOT, TINY, Job, run_mm

HEAVY = ("torch", "transformers", "diffusers")


def imported(*arguments: str) -> set[str]:
    """Top-level names that a fresh interpreter imports, read from `-X importtime`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 20
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import mm_core"),
        (
            "-c",
            "from mm_core import PREDICTOR_MODEL_MAPPINGS as m; assert 'wandit' in m and len(m) and list(m) and repr(m)",
        ),
        ("-m", "mm_core", "list"),
        ("-m", "mm_core", "list", "--format", "json"),
        ("-m", "mm_core", "check", *Job().flags()),
        ("-m", "mm_core", "train", "--help"),
    ],
    ids=["import", "mapping", "list", "list-json", "check", "train-help"],
)
def test_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    names = imported(*arguments)
    assert "mm_core" in names
    assert not names & set(HEAVY)


def test_list_names_distribution_version_and_origin() -> None:
    entries = {(e["group"], e["id"]): e for e in json.loads(run_mm("list", "--format", "json").out)}
    wandit = entries["mm_core.predictor_models", "wandit"]
    assert wandit["distribution"] == "mmzoo-plugin-wan22"
    assert wandit["version"]
    assert wandit["origin"]
    assert wandit["status"] == "available"
    assert entries["mm_core.ae_models", "haar_video"]["distribution"] == "mmzoo-plugin-haar"
    assert entries["mm_core.text_encoders", "UMT5"]["distribution"] == "mmzoo-core"
    table = run_mm("list").out
    for word in (
        "wandit",
        "wan_flow_match_scheduler",
        "wan_video_vae",
        "UMT5",
        "WanPipeline",
        "mmzoo-plugin-wan22",
    ):
        assert word in table


def test_check_of_the_examples() -> None:
    result = run_mm("check", *Job().flags())
    assert result.code == 0, result.err + result.out
    found = json.loads(run_mm("check", *Job().flags(), "--format", "json").out)
    assert not [f for f in found["findings"] if f["level"] == "error"]


@pytest.mark.parametrize(
    "name", ["model.json", "data.json", "tools.json", "fsdp2.yaml", "inference_model.json"]
)
def test_check_of_one_file(name: str) -> None:
    result = run_mm("check", TINY / name)
    assert result.code == 0, result.err + result.out


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(ROOT) for p in (ROOT / "examples").glob("wan2.*/**/*.json")), ids=str
)
def test_the_real_sizes_miss_nothing_but_their_files(path: Path) -> None:
    findings = json.loads(run_mm("check", path, "--format", "json").out)["findings"]
    errors = [f for f in findings if f["level"] == "error"]
    assert all(
        "does not exist" in f["message"] or "not found" in f["message"] or "no such" in f["message"].lower()
        for f in errors
    ), errors


def test_check_reports_all_errors_with_positions(tmp_path: Path) -> None:
    text = (ROOT / TINY / "model.json").read_text()
    bad = tmp_path / "model.json"
    bad.write_text(
        text.replace('"hidden_size"', '"hiden_size"').replace(
            '"wan_flow_match_scheduler"', '"wan_flow_match"'
        )
    )
    result = run_mm("check", *Job(model=bad).flags(), "--format", "json")
    assert result.code == 2
    errors = [f for f in json.loads(result.out)["findings"] if f["level"] == "error"]
    assert len(errors) >= 2
    assert all(f["file"] and f["line"] and f["column"] for f in errors)
    assert all(
        set(f) == {"level", "code", "message", "file", "line", "column", "path", "suggestion"} for f in errors
    )


def test_help_and_version() -> None:
    assert "train" in run_mm("--help").out
    assert "--micro-batch-size" in run_mm("train", "--help").out
    assert "--prompt" in run_mm("generate", "--help").out
    assert run_mm("--version").out.startswith("mm (mmzoo-core)")
