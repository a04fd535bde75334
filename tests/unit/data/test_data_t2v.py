from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import WriteVideo

from mm_core.data import DataError, T2VDataset, build_dataset
from mm_core.data import clips as clips_module

Fields = dict[str, Any]
MakeSet = Callable[..., Fields]


def frame_numbers(video: torch.Tensor) -> list[int]:
    """Which `grey_frame`s a clip `[3, T, H, W]` is made of."""
    levels = (video[:, :, :, : video.shape[-1] // 3].mean(dim=(0, 2, 3)) + 1) * 127.5
    return [round(float(level) / 10) for level in levels]


def item(name: str, **more: Any) -> Fields:
    return {"path": name, "cap": f"caption of {name}"} | more


def test_the_shipped_clips(t2v_fields: Fields) -> None:
    dataset = T2VDataset(seed=0, **t2v_fields)
    assert len(dataset) == 2
    for index, name in enumerate(("bunny", "tower")):
        sample = dataset[index]
        assert sample["video"].shape == (3, 8, 48, 64)
        assert sample["video"].dtype == torch.float32
        assert -1 <= sample["video"].min() < -0.5
        assert 0.5 < sample["video"].max() <= 1
        assert sample["prompt_ids"].shape == sample["prompt_mask"].shape == (32,)
        assert Path(sample["file"]).stem == name
    # Two thirds of a second between the clip's frames: they move.
    assert (dataset[0]["video"][:, 0] - dataset[0]["video"][:, 7]).abs().mean() > 0.1


def test_a_clip_does_not_depend_on_the_consumed_sample_if_there_is_no_choice(t2v_fields: Fields) -> None:
    dataset = T2VDataset(seed=0, **t2v_fields)
    assert torch.equal(dataset.get(0, 5)["video"], dataset.get(0, 77)["video"])


def test_everything_drawn_is_keyed_by_seed_and_consumed_sample(
    write_video: WriteVideo, make_set: MakeSet
) -> None:
    write_video("a.mp4", frames=20)
    fields = make_set([item("a.mp4", cap=["one", "two", "three"])], cfg=0.3)

    def stream(seed: int, keys: range) -> list[tuple[list[int], list[int]]]:
        dataset = T2VDataset(seed=seed, **fields)
        samples = [dataset.get(0, key) for key in keys]
        return [(frame_numbers(s["video"]), s["prompt_ids"].tolist()) for s in samples]

    first = stream(1, range(60))
    assert stream(1, range(30, 60)) == first[30:]
    assert stream(2, range(60)) != first
    assert all(frames == list(range(frames[0], frames[0] + 4)) for frames, _ in first)
    assert len({frames[0] for frames, _ in first}) > 8
    captions = Counter(tuple(ids) for _, ids in first)
    assert len(captions) == 4  # three captions, and none
    empty = next(count for ids, count in captions.items() if ids[0] == 1)
    assert 8 <= empty <= 30  # 18 expected


def test_captions_are_never_dropped_at_zero_and_always_at_one(
    write_video: WriteVideo, make_set: MakeSet
) -> None:
    write_video("a.mp4")
    kept = T2VDataset(seed=0, **make_set([item("a.mp4")], cfg=0.0))
    assert all(kept.get(0, key)["prompt_mask"].sum() > 1 for key in range(20))
    dropped = T2VDataset(seed=0, **make_set([item("a.mp4")], cfg=1.0))
    assert all(dropped.get(0, key)["prompt_mask"].sum() == 1 for key in range(20))


def test_cut_and_crop_choose_a_part(write_video: WriteVideo, make_set: MakeSet) -> None:
    write_video("a.mp4", frames=20)
    white = [32, 64, 0, 16]  # the right half is white
    items = [item("a.mp4", num_frames=4, fps=10, cut=[10, 14]), item("a.mp4", crop=white)]
    dataset = T2VDataset(seed=0, **make_set(items, hw_aspect_thr=4.0))
    assert frame_numbers(dataset[0]["video"]) == [10, 11, 12, 13]
    assert dataset[1]["video"].min() > 0.98


def test_a_crop_outside_the_frame_is_a_bad_sample(write_video: WriteVideo, make_set: MakeSet) -> None:
    write_video("a.mp4")
    fields = make_set([item("a.mp4", crop=[0, 640, 0, 320])])
    with pytest.raises(DataError, match=r"crop \[0, 640, 0, 320\] .* lies outside its 32×64 pixels"):
        _ = T2VDataset(seed=0, **fields)[0]


def break_file(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink(missing_ok=True)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no video", encoding="utf-8")
    else:
        path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize("how", ["missing", "empty", "text", "truncated"])
@pytest.mark.parametrize("annotated", [True, False])
def test_an_unreadable_sample_is_reported_once_and_replaced(
    how: str,
    annotated: bool,
    write_video: WriteVideo,
    make_set: MakeSet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_video(name)
    break_file(tmp_path / "b.mp4", how)
    facts = {"num_frames": 12, "fps": 10, "resolution": {"height": 32, "width": 64}} if annotated else {}
    fields = make_set([item(f"{letter}.mp4", **facts) for letter in "abc"])
    with caplog.at_level(logging.WARNING):
        dataset = T2VDataset(seed=0, **fields)
        files = [Path(dataset.get(1, key)["file"]).name for key in range(30)]
    reports = [r.getMessage() for r in caplog.records if "unreadable sample" in r.getMessage()]
    assert len(reports) == 1
    assert str(tmp_path / "b.mp4") in reports[0]
    assert set(files) == {"a.mp4", "c.mp4"}
    again = T2VDataset(seed=0, **fields)
    assert [Path(again.get(1, key)["file"]).name for key in reversed(range(30))] == files[::-1]
    assert len(dataset) == 3


def test_a_sample_that_breaks_later_is_met_while_training(
    write_video: WriteVideo, make_set: MakeSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(name)
    dataset = T2VDataset(seed=0, clip_cache_bytes=0, **make_set([item("a.mp4"), item("b.mp4")]))
    assert dataset.bad.count == 0
    break_file(tmp_path / "b.mp4", "truncated")
    with caplog.at_level(logging.WARNING):
        assert Path(dataset.get(1, 0)["file"]).name == "a.mp4"
    assert dataset.bad.count == 1
    break_file(tmp_path / "a.mp4", "empty")
    with pytest.raises(
        DataError, match=r"none of its 2 samples can be read: .*b\.mp4: .*; .*a\.mp4: the file is empty"
    ):
        dataset.get(0, 1)


def test_more_bad_samples_than_the_limit_are_an_error(
    write_video: WriteVideo, make_set: MakeSet, tmp_path: Path
) -> None:
    write_video("good.mp4")
    bad = [item(f"bad{i}.mp4") for i in range(3)]
    fields = make_set([*bad, item("good.mp4")])
    assert T2VDataset(seed=0, **fields, max_bad_samples=3).bad.count == 3
    message = r"3 of 4 samples cannot be read, more than max_bad_samples \(2\): .*bad0\.mp4: no such file"
    with pytest.raises(DataError, match=message):
        T2VDataset(seed=0, **fields, max_bad_samples=2)
    with pytest.raises(DataError, match=r"1 of 4 samples cannot be read"):
        T2VDataset(seed=0, **fields, max_bad_samples=0)
    assert T2VDataset(seed=0, **fields, max_bad_samples=0.75).bad.limit == 3
    with pytest.raises(DataError, match=r"2 of 4 samples cannot be read, more than max_bad_samples \(1\)"):
        T2VDataset(seed=0, **fields, max_bad_samples=0.01)  # a share allows at least one


def test_a_set_without_a_readable_sample_is_an_error(make_set: MakeSet, tmp_path: Path) -> None:
    facts = {"num_frames": 12, "fps": 10, "resolution": {"height": 32, "width": 64}}
    for extra in ({}, facts):
        fields = make_set([item(f"no{i}.mp4", **extra) for i in range(5)])
        with pytest.raises(DataError, match=r"none of its 5 samples .*no0\.mp4: no such file.*; and 2 more"):
            T2VDataset(seed=0, **fields, max_bad_samples=10)
        with pytest.raises(DataError, match=r"2 of 5 samples cannot be read.*no0\.mp4"):
            T2VDataset(seed=0, **fields)


def test_short_and_misshapen_videos_are_left_out_and_counted(
    write_video: WriteVideo, make_set: MakeSet, caplog: pytest.LogCaptureFixture
) -> None:
    write_video("good.mp4")
    write_video("short.mp4", frames=3)
    write_video("tall.mp4", height=96, width=32)
    names = ("good.mp4", "short.mp4", "tall.mp4")
    with caplog.at_level(logging.WARNING):
        dataset = T2VDataset(seed=0, **make_set([item(name) for name in names]))
    assert len(dataset) == 1
    assert dataset.dropped == {"too short": 1, "wrong shape": 1}
    assert "2 of 3 samples are left out: 1 too short (" in caplog.text
    assert "short.mp4: 3 frames after sampling, num_frames is 4" in caplog.text
    assert "tall.mp4: height / width is 3.00" in caplog.text


def test_a_set_that_the_rules_empty_is_an_error(write_video: WriteVideo, make_set: MakeSet) -> None:
    write_video("a.mp4", frames=3)
    with pytest.raises(DataError, match=r"none of its 1 samples fits .* 1 too short"):
        T2VDataset(seed=0, **make_set([item("a.mp4")]))


def test_an_annotation_that_promises_too_much_is_a_bad_sample(
    write_video: WriteVideo, make_set: MakeSet
) -> None:
    write_video("a.mp4", frames=12)
    facts = {"num_frames": 400, "fps": 10, "resolution": {"height": 32, "width": 64}}
    dataset = T2VDataset(seed=0, **make_set([item("a.mp4", **facts)]))
    with pytest.raises(DataError, match=r"none of its 1 samples .* it ends after 1\.20 s"):
        dataset.get(0, 0)  # frames of the first 12 would be drawn once in a hundred times


def test_clips_are_decoded_once(t2v_fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    read = clips_module.file_frames

    def counting(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened[Path(path).name] += 1
        return read(path, *args, **kwargs)

    monkeypatch.setattr(clips_module, "file_frames", counting)
    cached = T2VDataset(seed=0, **t2v_fields)
    videos = [cached.get(key % 2, key)["video"] for key in range(6)]
    assert opened == {"bunny.mp4": 1, "tower.mp4": 1}
    uncached = T2VDataset(seed=0, clip_cache_bytes=0, **t2v_fields)
    for key, video in enumerate(videos):
        assert torch.equal(uncached.get(key % 2, key)["video"], video)
    assert opened == {"bunny.mp4": 4, "tower.mp4": 4}


@pytest.mark.parametrize("mode", [None, "standard"])
def test_a_single_annotation_file_has_its_videos_beside_it(
    mode: str | None, write_video: WriteVideo, make_set: MakeSet, tmp_path: Path
) -> None:
    path = write_video("a.mp4")
    fields = make_set([item("a.mp4")])
    fields["basic_parameters"] = {"data_path": str(tmp_path / "annotation.json"), "data_storage_mode": mode}
    assert T2VDataset(seed=0, **fields)[0]["file"] == str(path)


def test_a_data_list_is_the_default(t2v_fields: Fields) -> None:
    del t2v_fields["basic_parameters"]["data_storage_mode"]
    assert len(T2VDataset(seed=0, **t2v_fields)) == 2


def test_captions_are_cleaned_only_if_asked(write_video: WriteVideo, make_set: MakeSet) -> None:
    write_video("a.mp4")
    fields = make_set([item("a.mp4", cap="a  &amp;  b")])
    clean = T2VDataset(seed=0, **fields)[0]["prompt_ids"]
    raw = T2VDataset(seed=0, **fields, enable_text_preprocessing=False)[0]["prompt_ids"]
    assert not torch.equal(clean, raw)
    one = fields | {"text_preprocess_methods": {"method": "basic_clean"}}
    assert torch.equal(T2VDataset(seed=0, **one)[0]["prompt_ids"], clean)  # the tokenizer joins spaces itself


def test_the_registered_dataset_is_built_from_a_job_s_section(t2v_fields: Fields) -> None:
    from mm_core import DATASET_MAPPINGS
    from mm_core.config import T2VDatasetConfig
    from mm_core.config.component import ComponentConfig

    config = T2VDatasetConfig.model_validate(t2v_fields)
    component = ComponentConfig(
        role="dataset",
        model_id="t2v",
        spec=DATASET_MAPPINGS.spec("t2v"),
        config=config,
        fields=config.effective(),
    )
    dataset = build_dataset(component, seed=7)
    assert isinstance(dataset, T2VDataset)
    assert dataset.seed == 7
    assert torch.equal(dataset[0]["video"], T2VDataset(seed=0, **t2v_fields)[0]["video"])
