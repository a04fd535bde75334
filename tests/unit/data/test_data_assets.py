"""The clips, annotations and tokenizer of examples/tiny/wan22-t2v."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import CLIPS, TINY

from mm_core.data.text import PromptTokenizer


def test_the_media_are_small_and_their_licence_is_beside_them() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 500_000
    notice = (TINY / "NOTICE.md").read_text(encoding="utf-8")
    for clip in CLIPS:
        assert f"clips/{clip.name}" in notice
    for needed in ("Blender Foundation", "Creative Commons Attribution 3.0", "CC0 1.0"):
        assert needed in notice


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.stem)
def test_captions_prompts_and_tokenizer_belong_together(clip: Path) -> None:
    (item,) = json.loads((TINY / f"{clip.stem}.json").read_text(encoding="utf-8"))
    assert item["path"] == clip.name
    for name in ("prompts.txt", "captions.txt"):
        assert item["cap"] in (TINY / name).read_text(encoding="utf-8").splitlines()
    ids, mask = PromptTokenizer(TINY / "tokenizer", 64)(item["cap"])
    length = int(mask.sum())
    assert length < 32
    assert not [i for i in ids[:length].tolist() if 3 <= i < 259]  # whole pieces, no bytes


def test_the_tokenizer_is_text() -> None:
    for path in (TINY / "tokenizer").iterdir():
        json.loads(path.read_text(encoding="utf-8"))
