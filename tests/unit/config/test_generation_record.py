"""A video's record that is damaged is a mistake of the user's, told in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mm_core.config.generation_record import read_recorded
from mm_registry.errors import UserError

RECORD: dict[str, Any] = {
    "inference_file": {}, "prompt": "a", "index": 3, "seed": 1, "steps": 2, "guidance_scale": 1.0, "lora": [], "ema": False,
    "image": None, "last_image": None,
}  # fmt: skip


def test_a_record_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(RECORD))
    assert read_recorded(str(file)).indices == (3,)


@pytest.mark.parametrize(
    ("load", "weights", "read"),
    [
        ("runs/a", {"predictor": "/runs/a/checkpoints/iter_0000003"}, "/runs/a/checkpoints/iter_0000003"),
        ("runs/both", {"predictor": "/x", "low_noise_predictor": "/x"}, "/x"),
        (["high", "low"], {"predictor": "/high", "low_noise_predictor": "/low"}, ["/high", "/low"]),
        (None, {"predictor": "/weights/transformer"}, None),
        (["high", "low"], {"predictor": "/high"}, None),
        ("runs/a", None, None),
    ],
)
def test_the_weights_are_those_that_were_read(tmp_path: Path, load: Any, weights: Any, read: Any) -> None:
    """A run that was named may have gone on since."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**RECORD, "inference_file": {"load": load}, "weights": weights}))
    assert read_recorded(str(file)).overrides["load"] == read


@pytest.mark.parametrize(
    "wrong",
    [
        {"index": "x"}, {"index": None}, {"index": -1}, {"index": float("inf")}, {"index": 1.5}, {"prompt": ["a"]},
        {"prompt": None}, {"seed": "x"}, {"steps": "x"}, {"steps": -1}, {"guidance_scale": "x"},
        {"guidance_scale": [float("nan")]}, {"lora": [3]}, {"lora": "ab"}, {"ema": "x"},
        {"image": {"path": "\0", "sha256": "0"}}, {"image": "a.png"},
    ],
)  # fmt: skip
def test_a_damaged_record_is_told(tmp_path: Path, wrong: dict[str, Any]) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**RECORD, **wrong}))
    ((key, value),) = wrong.items()
    value = ["x"] if (key, value) == ("guidance_scale", "x") else value
    said = {"steps": "num_inference_steps", "lora": "lora_load"}.get(key, key)
    told = rf"its {said} is {re.escape(json.dumps(value)[:20])}" if key != "image" else "image"
    with pytest.raises(UserError, match=rf"--repeat .*{told}"):
        read_recorded(str(file))


@pytest.mark.parametrize("wrong", [[], "a", None, {"prompt": "a"}])
def test_another_json_file_is_no_record(tmp_path: Path, wrong: Any) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(wrong))
    why = "it lacks 'inference_file'" if isinstance(wrong, dict) else "it is no JSON object"
    with pytest.raises(UserError, match=rf"no record of a video that mm generate wrote \({why}\)"):
        read_recorded(str(file))


def test_a_record_nested_too_deep_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_recorded(str(file))
