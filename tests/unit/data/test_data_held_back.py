"""A validation set of videos: a file of its own, or a share of the samples that training then never sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import WriteVideo
from pydantic import ValidationError

from mm_core.config.data import DataConfig
from mm_core.data import DataError, T2VDataset
from mm_core.data.validation import ValidationBatches


@pytest.fixture
def fields(tmp_path: Path, write_video: WriteVideo, t2v_fields: dict[str, Any]) -> dict[str, Any]:
    """Six videos of two shapes, and two more to validate with."""
    shapes = [(32, 64), (32, 64), (64, 32), (32, 64), (64, 32), (32, 64), (32, 64), (32, 64)]
    items = []
    for i, (height, width) in enumerate(shapes):
        write_video(f"{i}.mp4", frames=12, height=height, width=width)
        size = {"height": height, "width": width}
        items.append(
            {
                "path": str(tmp_path / f"{i}.mp4"),
                "cap": f"{i}",
                "num_frames": 12,
                "fps": 10,
                "resolution": size,
            }
        )
    (tmp_path / "all.json").write_text(json.dumps(items[:6]), encoding="utf-8")
    (tmp_path / "more.json").write_text(json.dumps(items[6:]), encoding="utf-8")
    preprocess = {
        "num_frames": 4, "min_num_frames": 1, "train_fps": 10, "max_hxw": 2048, "min_hxw": 1, "hw_stride": 16, "cfg": 1.0,
        "force_resolution": False, "hw_aspect_thr": 4.0, "drop_short_ratio": 1.0,
    }  # fmt: skip
    return {
        **t2v_fields,
        "basic_parameters": {"data_path": str(tmp_path / "all.json")},
        "preprocess_parameters": preprocess,
    }


def having(fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**fields, "basic_parameters": {**fields["basic_parameters"], **more}}


def files(dataset: Any) -> list[str]:
    return [Path(sample.annotation.path).stem for sample in dataset.samples]


def test_a_share_is_held_back_and_never_trained_on(fields: dict[str, Any]) -> None:
    whole, dataset = T2VDataset(seed=3, **fields), T2VDataset(seed=3, **having(fields, val_rate=0.34))
    held = dataset.validation
    assert held is not None
    assert whole.validation is None
    assert held.validation is None
    assert (len(dataset), len(held)) == (4, 2)
    assert sorted(files(dataset) + files(held)) == files(whole)
    assert files(T2VDataset(seed=3, **having(fields, val_rate=0.34)).validation) == files(held)
    for index, name in enumerate(files(held)):
        sample, same = held.get(index, 9), whole.get(int(name), 9)
        assert torch.equal(sample["video"], same["video"])
        assert sample["prompt_mask"].sum() > 1, "no caption is dropped here"
        assert same["prompt_mask"].sum() == 1
        assert held.bucket(index) == whole.bucket(int(name))
    assert len(T2VDataset(seed=3, **having(fields, val_rate=0.5, val_max_samples=1)).validation or ()) == 1
    with pytest.raises(DataError, match="none is left to train with"):
        T2VDataset(seed=3, **having(fields, val_rate=0.95))


def test_a_file_of_its_own(tmp_path: Path, fields: dict[str, Any]) -> None:
    dataset = T2VDataset(seed=3, **having(fields, val_data_path=str(tmp_path / "more.json")))
    assert files(dataset) == list("012345")
    assert files(dataset.validation) == ["6", "7"]
    assert dataset.validation is not None
    assert dataset.validation[0]["prompt_mask"].sum() > 1
    assert dataset.config.validates
    for wrong in ({"val_rate": 0.1, "val_data_path": "a.json"}, {"val_max_samples": 3}):
        with pytest.raises(ValidationError):
            T2VDataset(seed=3, **having(fields, **wrong))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_micro_batch_of_validation_has_one_shape(fields: dict[str, Any], ranks: int) -> None:
    dataset = T2VDataset(seed=3, **fields)
    seen = []
    for rank in range(ranks):
        batches = ValidationBatches(
            dataset, DataConfig(dataset_param={}), seed=0, dp_rank=rank, dp_size=ranks, micro_batch_size=2
        )
        assert len(batches) == -(-3 // ranks)
        for batch, samples in batches:
            seen += batch["sample_index"].tolist() if samples else []
    assert sorted(seen) == list(range(6))
