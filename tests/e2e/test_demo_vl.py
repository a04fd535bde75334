"""`make demo-vl`: what it leaves behind, and that it learns; one that cannot have learnt says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import ENVIRONMENT, ROOT

HERE = Path("examples/tiny/qwen3vl")


@pytest.fixture
def save() -> Iterator[str]:
    """A run's folder inside the repository, since commands of the demo run there."""
    folder = "runs/test-demo-vl"
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    yield folder
    shutil.rmtree(ROOT / folder, ignore_errors=True)


def demo(save: str, steps: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / HERE / "demo.py", "--save", save, "--train-iters", str(steps)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_right_caption_for_each_photograph_after_training_and_none_before(save: str) -> None:
    done = demo(save, 200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    summary = json.loads((ROOT / save / "summary.json").read_text())
    assert (summary["photographs"], summary["right_before"], summary["right_after"]) == (8, 0, 8)
    page = (ROOT / save / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == page.count("✓") == 8
    assert "http" not in page
    with Image.open(ROOT / save / "comparison.png") as sheet:
        assert sheet.size == (760, 880)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_step_teaches_nothing_and_that_is_a_failure(save: str) -> None:
    done = demo(save, 1)
    assert done.returncode == 1, done.stderr
    assert "The captions were not learnt." in done.stdout


def test_photographs_are_small_and_each_is_in_the_notice() -> None:
    notice = (ROOT / HERE / "NOTICE.md").read_text()
    photos = sorted((ROOT / HERE / "photos").iterdir())
    assert len(photos) == 8
    for photo in photos:
        assert f"| {photo.name} |" in notice
        with Image.open(photo) as image:
            assert max(image.size) <= 256
            assert not image.getexif()
