"""The loss curve as a PNG."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_core.observe.plots import plot_loss
from mm_registry.errors import UserError


def metrics(path: Path, losses: list[float], tail: str = "") -> Path:
    lines = [
        json.dumps({"step": step, "loss": loss, "lr": 1e-3}) + "\n" for step, loss in enumerate(losses, 1)
    ]
    path.write_text("".join(lines) + tail)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_a_png_with_a_curve(tmp_path: Path) -> None:
    falling = metrics(tmp_path / "a.jsonl", [2.0 * 0.9**n for n in range(40)])
    assert plot_loss(falling, tmp_path / "loss.png") == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    falling_pixels = pixels(tmp_path / "loss.png")
    assert falling_pixels.shape[0] > 300
    assert falling_pixels.shape[1] > 600
    assert len(np.unique(falling_pixels.reshape(-1, 3), axis=0)) > 10
    plot_loss(metrics(tmp_path / "b.jsonl", [2.0] * 40), tmp_path / "flat.png")
    assert not np.array_equal(falling_pixels, pixels(tmp_path / "flat.png"))


@pytest.mark.parametrize("losses", [[1.0], [0.0, 1.0], [-1.0, 2.0]])
def test_one_step_and_losses_without_a_logarithm(tmp_path: Path, losses: list[float]) -> None:
    pixels(plot_loss(metrics(tmp_path / "metrics.jsonl", losses), tmp_path / "loss.png"))


def test_a_live_run_may_be_writing_its_last_line(tmp_path: Path) -> None:
    plot_loss(metrics(tmp_path / "a.jsonl", [3.0, 2.0]), tmp_path / "a.png")
    plot_loss(metrics(tmp_path / "b.jsonl", [3.0, 2.0], tail='{"step": 3, "lo'), tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no step"):
        plot_loss(metrics(tmp_path / "metrics.jsonl", []), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_the_name_does_not_choose_the_format(tmp_path: Path) -> None:
    pixels(plot_loss(metrics(tmp_path / "metrics.jsonl", [1.0, 0.5]), tmp_path / "picture"))
