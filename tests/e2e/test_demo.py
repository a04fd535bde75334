"""`make demo`: what it leaves behind, and that it visibly learns."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.e2e.conftest import ENVIRONMENT, ROOT, TINY


@pytest.fixture
def save() -> Iterator[str]:
    """A run's folder inside the repository, since the demo names its results relative to it."""
    folder = "runs/test-demo"
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    yield folder
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    shutil.rmtree(ROOT / f"{folder}.1", ignore_errors=True)


def demo(save: str, *flags: str) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, ROOT / TINY / "demo.py", "--save", save, *flags],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((ROOT / save / "summary.json").read_text()), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_makes_what_it_names_and_moves_an_older_run_aside(save: str) -> None:
    (ROOT / save).mkdir(parents=True)
    (ROOT / save / "kept.txt").write_text("an older run")
    summary, out = demo(save, "--train-iters", "2")
    assert (ROOT / f"{save}.1" / "kept.txt").exists()
    assert {"psnr_before_db", "psnr_after_db", "seconds", "steps"} <= set(summary)
    assert summary["steps"] == 2
    for name in ("before", "after", "comparison", "loss", "metrics"):
        path = ROOT / summary[name]
        assert path.stat().st_size > 0
        assert summary[name] in out
    assert Image.open(ROOT / summary["comparison"]).size[0] > 400
    assert Path(summary["before"]).name == "before.mp4"
    assert Path(summary["after"]).name == "after.mp4"


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_demo_visibly_learns(save: str) -> None:
    summary, out = demo(save)
    assert summary["psnr_after_db"] >= summary["psnr_before_db"] + 6.0
    assert f"{summary['psnr_after_db']:.1f} dB after" in out
