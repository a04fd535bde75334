"""Grouping of samples against the dataset whose samples are grouped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import ConfigError, load_training_job, parse_train_flags, read_document

ROOT = Path(__file__).resolve().parents[3]


def load(example: str, tmp_path: Path, **loader: Any) -> Any:
    folder = ROOT / "examples" / "tiny" / example
    data = read_document(str(folder / "data.json")).data
    data.setdefault("dataloader_param", {}).update(loader)
    (tmp_path / "data.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    flags = ["--mm-model", str(folder / "model.json"), "--mm-data", str(tmp_path / "data.json"), "--lr", "1e-3",
             "--train-iters", "4", "--micro-batch-size", "1"]  # fmt: skip
    return load_training_job(parse_train_flags(flags))


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            {"group_data": True},
            r'samples of dataset_type "huggingface" cannot be grouped by size. Set it to false',
        ),
        (
            {"sampler_type": "LengthGroupedSampler"},
            "cannot be grouped by size. Use stateful_distributed_sampler",
        ),
    ],
)
def test_samples_without_sizes_cannot_be_grouped(
    loader: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"data\.json:\d+:\d+: .*{message}"):
        load("qwen3vl", tmp_path, **loader)


def test_clips_can_be_grouped(tmp_path: Path) -> None:
    job = load("wan22-t2v", tmp_path, group_data=True, sampler_type="LengthGroupedSampler", shuffle=True)
    assert job.data.dataloader_param.grouped_axes() == ("frames", "height", "width")
    job = load("wan22-t2v", tmp_path, group_data=False, group_frame=True)
    assert job.data.dataloader_param.grouped_axes() == ("frames",)
