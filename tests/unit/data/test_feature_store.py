"""Stored features: what is read is what was written, or the user is told."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mm_core.data.annotations import Annotation
from mm_core.data.buckets import ClipShape
from mm_core.data.errors import DataError
from mm_core.data.feature_store import FeatureStore, sample_row, shard_name
from mm_core.data.selection import Sample
from mm_core.models.parking import Parked
from mm_registry.errors import UserError

LATENTS = torch.arange(24.0).view(2, 3, 2, 2)
PROMPT = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
EMPTY = torch.tensor([[5.0, 6.0]], dtype=torch.bfloat16)


def store(folder: Path, **changes: Any) -> FeatureStore:
    """One video with two clips and two captions, one of them long."""
    clips = {"c0/latents": LATENTS, "c1/latents": LATENTS + 1}
    save_file(clips, folder / shard_name("clips", 0))
    save_file({"p0/prompt": PROMPT, "p1/prompt": EMPTY}, folder / shard_name("prompts", 0))
    annotation = Annotation(Path("a.mp4"), ("one", "two"), "a.json:1", 9, 8.0, 16, 24, crop=(0, 8, 0, 8))
    sample = Sample(annotation, 9, 8.0, ClipShape(9, 16, 16))
    row = sample_row(sample, [("c0", 0), ("c1", 0)], [("p0", 0), ("p0", 0)])
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    index = {
        "format": "mm-features", "version": 1, "plan": "0", "samples": 1, "empty": ["p1", 0],
        "video": {"encoders": {}, "settings": {}, "tensors": {"latents": {"dtype": "float32", "shape": [2, 3, 2, 2]}}},
        "text": {
            "encoders": {}, "settings": {"length": 4}, "tensors": {"prompt": {"dtype": "bfloat16", "shape": [None, 2]}},
        },
        **changes,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return FeatureStore(folder / "index.json")


def test_what_is_read_is_what_was_stored(tmp_path: Path) -> None:
    made = store(tmp_path)
    (sample,) = made.samples
    assert (sample.frames, sample.fps, sample.shape) == (9, 8.0, ClipShape(9, 16, 16))
    assert (sample.annotation.captions, sample.annotation.crop) == (("one", "two"), (0, 8, 0, 8))
    assert torch.equal(made.clip(0, 2)["latents"], LATENTS)
    assert torch.equal(made.clip(0, 7)["latents"], LATENTS + 1)
    read = made.prompt("two")
    assert torch.equal(read["prompt"], torch.cat([PROMPT, torch.zeros(2, 2, dtype=torch.bfloat16)]))
    assert read["prompt_mask"].tolist() == [1, 1, 0, 0]
    assert made.prompt("")["prompt_mask"].tolist() == [1, 0, 0, 0]
    sent = pickle.loads(pickle.dumps(made))
    assert torch.equal(sent.clip(0, 0)["latents"], LATENTS)


def test_what_is_not_as_the_index_says_is_told(tmp_path: Path) -> None:
    made = store(tmp_path)
    with pytest.raises(DataError, match="has no embedding of the caption 'three'"):
        made.prompt("three")
    save_file({"c0/latents": LATENTS.half()}, tmp_path / shard_name("clips", 0))
    made = FeatureStore(tmp_path / "index.json")
    with pytest.raises(
        DataError, match=r"latents of c0 is torch.float16 \[2, 3, 2, 2\], but the index says float32"
    ):
        made.clip(0, 0)
    with pytest.raises(
        DataError,
        match=r"clips-000000.safetensors: c1 cannot be read .*; `mm extract-features`.* makes the file again",
    ):
        made.clip(0, 1)
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(DataError, match=r"has 0 samples, but .*index.json says 1"):
        FeatureStore(tmp_path / "index.json")


def test_parked_modules_make_one_trip_for_all_that_is_nested() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False).eval()
    weight, inputs = module[0].weight, torch.rand(3, 2)
    before = module(inputs)
    parked = Parked([module], torch.device("cpu"))
    with parked.on_device(), parked.on_device():
        assert torch.equal(module(inputs), before)
    with parked.on_device():
        pass
    assert parked.trips == 2
    assert module[0].weight is weight
    assert torch.equal(module(inputs), before)


@pytest.mark.parametrize("length", [None, "x", 0, -1, 1.5, True, 10**12])
def test_an_index_without_a_length_of_embeddings_is_damaged(tmp_path: Path, length: object) -> None:
    text = {
        "encoders": {},
        "settings": {"length": length},
        "tensors": {"prompt": {"dtype": "bfloat16", "shape": [None, 2]}},
    }
    with pytest.raises(UserError, match=r"index.json: is damaged .*; make the features again"):
        store(tmp_path, text=text)


def test_damaged_features_are_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index.json: is damaged"):
        store(tmp_path, video={"encoders": {}, "settings": {}, "tensors": {}})
    with pytest.raises(UserError, match=r"index.json: is damaged"):
        store(tmp_path, samples=float("inf"))
    text = {
        "encoders": {},
        "settings": {"length": 1},
        "tensors": {"prompt": {"dtype": "bfloat16", "shape": [None, 2]}},
    }
    with pytest.raises(DataError, match="embeddings have 1 tokens, but the caption 'one' has 2"):
        store(tmp_path, text=text).prompt("one")
    rows = tmp_path / "samples.jsonl"
    row = json.loads(rows.read_text())
    for shape in (["x", 16, 16], [9, 0, 16]):
        rows.write_text(json.dumps({**row, "shape": shape}) + "\n")
        with pytest.raises(DataError, match=r"samples.jsonl:1: is damaged"):
            FeatureStore(tmp_path / "index.json")
    rows.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"samples.jsonl: is damaged"):
        FeatureStore(tmp_path / "index.json")


@pytest.mark.parametrize("version", [True, 2, "1", None])
def test_an_index_of_another_version_is_refused(tmp_path: Path, version: object) -> None:
    with pytest.raises(
        UserError, match=rf"index.json: has version {version} of the format.*make the features again"
    ):
        store(tmp_path, version=version)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", 3),
        ("captions", "one"),
        ("captions", [1, 2]),
        ("frames", "9"),
        ("frames", True),
        ("fps", -8.0),
        ("fps", float("inf")),
        ("height", 16.5),
        ("width", -24),
        ("first_frame", None),
        ("crop", [0, 8, 0]),
        ("crop", [0, 8, 0, "8"]),
        ("shape", [True, 16, 16]),
    ],
)
def test_a_line_with_a_value_of_another_kind_is_damaged(tmp_path: Path, name: str, value: object) -> None:
    store(tmp_path)
    rows = tmp_path / "samples.jsonl"
    rows.write_text(json.dumps({**json.loads(rows.read_text()), name: value}) + "\n")
    with pytest.raises(DataError, match=r"samples.jsonl:1: is damaged .*; make the features again"):
        FeatureStore(tmp_path / "index.json")
