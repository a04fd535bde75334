"""`mm check` with several files, and with `--build`, as a user types it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Job

pytestmark = pytest.mark.timeout(300)
CORPUS = Path(__file__).resolve().parents[1] / "corpus/wan2.2/A14B/i2v"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """MindSpeed-MM's own files of Wan2.2's image-to-video model."""
    for file in CORPUS.glob("*.json"):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path


def test_the_published_boundary_is_found(mm: Callable[..., Any], published: Path) -> None:
    names = ["pretrain_model_high.json", "pretrain_model_low.json", "inference_model.json"]
    done = mm("check", *names, "--format", "json", cwd=published)
    found = [f for f in json.loads(done.out)["findings"] if f["code"] in ("boundary", "shift")]
    assert [(f["level"], f["file"], f["path"]) for f in found] == [
        ("warning", "inference_model.json", "boundary_ratio"),
        ("note", "inference_model.json", "diffusion.flow_shift"),
    ]
    lines = (published / "inference_model.json").read_text().splitlines()
    assert lines[found[0]["line"] - 1][found[0]["column"] - 1 :].startswith("0.875")
    assert "boundary_ratio 0.875 is sigma 0.8750" in found[0]["message"]
    assert "sigma 0.8997 (max_timestep_boundary 0.358 at shift 5" in found[0]["message"]
    for name in names:
        alone = json.loads(mm("check", name, "--format", "json", cwd=published).out)["findings"]
        assert not [f for f in alone if f["code"] in ("boundary", "shift")]


def test_build_of_the_tiny_job(mm: Callable[..., Any]) -> None:
    done = mm("check", "--build", *Job().flags())
    assert done.code == 0, done.out + done.err
    assert done.out.startswith("predictor (wandit): 123 tensors, 972000 parameters, 4 units\n")


def test_build_names_a_wrong_pattern(mm: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "fsdp2.yaml").write_text("recompute_modules:\n  - predictor.blocks.{9}\n")
    done = mm("check", "examples/tiny/wan22-t2v/model.json", tmp_path / "fsdp2.yaml", "--build")
    assert done.code == 2
    assert f"{tmp_path / 'fsdp2.yaml'}:2:5 error: recompute_modules" in done.out
    without = mm("check", "examples/tiny/wan22-t2v/model.json", tmp_path / "fsdp2.yaml")
    assert without.code == 0
