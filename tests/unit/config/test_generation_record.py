"""A video's record that is damaged is a mistake of the user's, told in one sentence."""

from __future__ import annotations

import json
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
    with pytest.raises(UserError, match="--repeat"):
        read_recorded(str(file))


def test_a_record_nested_too_deep_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_recorded(str(file))
