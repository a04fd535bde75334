"""`dataset_type: huggingface`: what training gets, the cache, packing, validation, bad rows and resume."""

from __future__ import annotations

import json
import logging
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import WriteVideo
from PIL import Image

from mm_core.config.data import DataConfig
from mm_core.data import build_loader
from mm_core.data.chat.cache import PreparedCache
from mm_core.data.chat.dataset import chat_dataset
from mm_core.data.chat.prepare import Block
from mm_core.data.errors import DataError
from tests import tiny_vlm

LENGTH = 160
Make = Callable[..., Any]


def row(number: int, image: str | None = None) -> dict[str, Any]:
    prompt = ("<image>" if image else "") + f"Say {number}" + "?" * (number % 5)
    made = {
        "conversations": [
            {"from": "human", "value": prompt},
            {"from": "gpt", "value": "word " * (1 + 5 * (number % 7))},
        ]
    }
    return {**made, "images": [image]} if image else made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that writes rows, every third with an image, and makes the dataset of them."""
    monkeypatch.chdir(tmp_path)
    for size in (32, 64):
        Image.new("RGB", (size, size), "red").save(f"{size}.png")

    def make(rows: list[Any] | int = 20, /, template: str = "qwen3_vl_nothink", **basic: Any) -> Any:
        if isinstance(rows, int):
            rows = [row(i, None if i % 3 else f"{32 + 32 * (i % 2)}.png") for i in range(rows)]
        limit = {name: basic.pop(name) for name in ("max_bad_samples",) if name in basic}
        length, attr = basic.pop("length", LENGTH), basic.pop("attr", {})
        Path("chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        return chat_dataset(
            seed=7,
            sequence_length=length,
            basic_parameters={"template": template, "dataset": "chats.jsonl", "dataset_dir": ".", **basic},
            preprocess_parameters={"model_name_or_path": str(folder), "image_max_pixels": 64 * 64},
            attr={"images": "images", **attr},
            **limit,
        )

    return make


def batches(
    dataset: Any, count: int, consumed: int = 0, position: Any = None, workers: int = 0, **options: Any
) -> Any:
    data = DataConfig.model_validate({"dataset_param": {}, "dataloader_param": options})
    loader = build_loader(
        dataset, data, seed=7, dp_rank=0, dp_size=1, micro_batch_size=2, global_batch_size=2, num_workers=workers,
        consumed_samples=consumed, position=position,
    )  # fmt: skip
    return list(islice(iter(loader), count)), loader


def read_all(make: Callable[[], Any]) -> list[Any]:
    dataset = make()
    return [dataset.get(i, i) for i in range(len(dataset))]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_is_what_the_network_takes(make: Make) -> None:
    dataset = make()
    (batch, *_), _ = batches(dataset, 1)
    one, other = dataset[0], dataset[1]
    assert "pixel_values" in one
    assert "pixel_values" not in other
    length = batch["input_ids"].shape[1]
    assert length % 8 == 0
    assert length - 8 < max(len(one["input_ids"]), len(other["input_ids"])) <= length
    for place, sample in enumerate((one, other)):
        size = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][place, :size], sample["input_ids"])
        assert torch.equal(batch["labels"][place, :size], sample["labels"])
        assert batch["attention_mask"][place].tolist() == [1] * size + [0] * (length - size)
        assert (batch["labels"][place, size:] == -100).all()
    assert (batch["mm_token_type_ids"][1] == 0).all()
    assert torch.equal(batch["pixel_values"], one["pixel_values"])
    assert batch["image_grid_thw"].tolist() == one["image_grid_thw"].tolist()


def test_a_video(make: Make, write_video: WriteVideo) -> None:
    write_video("clip.mp4", frames=20, fps=10, height=64, width=64)
    clip = {**row(1), "videos": ["clip.mp4"]}
    clip["conversations"] = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "Grey."}]
    dataset = make([clip, row(2), row(3, "32.png")], attr={"videos": "videos"}, neat_packing=True, length=512)
    (sample,) = [dataset[i] for i in range(len(dataset))]
    frames, rows, columns = sample["video_grid_thw"][0].tolist()
    assert len(sample["pixel_values_videos"]) == frames * rows * columns
    assert (sample["mm_token_type_ids"] == 2).sum() == frames * rows * columns // 4
    assert (sample["mm_token_type_ids"] == 1).sum() == sample["image_grid_thw"].prod() // 4
    assert (sample["labels"][sample["mm_token_type_ids"] > 0] == -100).all()
    assert sample["document_ids"].max() == 2


def test_the_same_samples_prepared_packed_or_not(make: Make, tmp_path: Path) -> None:
    plain = make()
    prepared = make(cache_dir="cache", preprocessing_batch_size=3, preprocessing_num_workers=2)
    assert all(same(plain[i], prepared[i]) for i in range(20))
    assert prepared.prepared.sample(1) is not None
    assert prepared.prepared.sample(0) is None
    packed = make(cache_dir="cache", neat_packing=True)
    seen = []
    for sequence, sample in zip(packed.sequences, (packed[i] for i in range(len(packed))), strict=True):
        assert len(sample["input_ids"]) <= LENGTH
        grids = 0
        for document, place in enumerate(sequence):
            one, its = plain[place], sample["document_ids"] == document
            for name in ("input_ids", "labels"):
                assert torch.equal(sample[name][its], one[name])
            if "image_grid_thw" in one:
                assert torch.equal(sample["image_grid_thw"][grids : grids + 1], one["image_grid_thw"])
                grids += 1
        seen += sequence
    assert sorted(seen) == list(range(20))
    assert len(packed) < 15
    batch = packed.collate_fn([packed[0], packed[1]])
    assert set(batch["document_ids"][batch["attention_mask"] == 0].tolist()) <= {-1}
    assert (batch["document_ids"][batch["attention_mask"] == 1] >= 0).all()
    assert "document_ids" not in make(packing=True)[0]  # one text, as MindSpeed-MM packs


def test_the_cache_is_made_once_and_again_when_it_must(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_ino for path in tmp_path.glob("cache/chat-*/*")}

    make(cache_dir="cache")
    before = state()
    assert len(before) == 3
    assert not list(tmp_path.glob("cache/.chat*"))
    make(cache_dir="cache")
    assert state() == before
    make(cache_dir="cache", overwrite_cache=True)
    assert state().keys() == before.keys()
    assert not set(state().values()) & set(before.values())
    make(cache_dir="cache", mask_history=True)  # other labels have another place
    make(21, cache_dir="cache")
    assert len(list(tmp_path.glob("cache/chat-*/"))) == 3
    for damaged in sorted(before):
        content = bytearray(damaged.read_bytes())
        content[-3] ^= 1
        damaged.write_bytes(content)
        with caplog.at_level(logging.WARNING):
            dataset = make(cache_dir="cache")
        assert "is damaged" in caplog.text
        caplog.clear()
        assert same(dataset[1], make()[1])


def _prepare_slowly(folder: str) -> None:
    def blocks() -> Iterator[Block]:
        with Path(folder, "asked").open("a") as file:
            file.write("once\n")
        time.sleep(0.3)
        none = np.zeros(0, np.int32)
        yield Block(
            np.ones(1, np.int32), np.ones((1, 2), np.int32), np.zeros(1, np.int64), none, none.astype(bool)
        )

    assert PreparedCache(folder, "f").load_or_make(blocks()).lengths.tolist() == [1]


def test_one_process_makes_the_cache(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=_prepare_slowly, args=(str(tmp_path),)) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert (tmp_path / "asked").read_text() == "once\n"


def test_cache_that_cannot_be_written(make: Make, tmp_path: Path) -> None:
    Path("cache").write_text("a file")
    with pytest.raises(DataError, match="cache_dir: cache cannot be used: "):
        make(cache_dir="cache")
    tokens = np.zeros(1 << 16, np.int32)
    block = Block(np.full(1, 1 << 16), np.zeros((1, 2)), np.full(1, 1 << 16), tokens, tokens > 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, hard))  # as on a disk that is full
    try:
        with pytest.raises(DataError, match=r"cache_dir: .*full cannot be used: .*I/O error"):
            PreparedCache("full", "x").load_or_make([block])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in Path("full").iterdir()] == ["chat-x.lock"]


@pytest.mark.parametrize("basic", [{}, {"cache_dir": "cache"}, {"neat_packing": True}])
def test_bad_rows_are_left_out_by_name(
    make: Make, basic: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(i) for i in range(20)]
    rows[3] = {"conversations": []}
    rows[18] = row(18, "missing.png")
    with caplog.at_level(logging.WARNING):
        dataset = make(rows, max_bad_samples=2, **basic)
        items = read_all(lambda: dataset)
    assert caplog.text.count("chats.jsonl:4 (conversation 3): ") == 1
    assert caplog.text.count('chats.jsonl:19 (conversation 18): there is no image "missing.png"') == 1
    assert sum("document_ids" in item for item in items) in (0, len(dataset))
    if not basic:
        assert same(items[3], dataset.get(3, 3))
        assert len(items) == 20
    many = (
        r"2 of 20 samples cannot be read, more than max_bad_samples \(1\): chats.jsonl:4 .*; chats.jsonl:19 "
    )
    with pytest.raises(DataError, match=many):
        read_all(lambda: make(rows, max_bad_samples=1, **basic))


def test_an_image_that_breaks_after_packing(make: Make) -> None:
    dataset = make(neat_packing=True, max_bad_samples=1)
    number = next(i for i, sequence in enumerate(dataset.sequences) if 0 in sequence)
    before = dataset[number]
    Path("32.png").write_bytes(b"no image")
    dataset = make(neat_packing=True, max_bad_samples=10, cache_dir="cache")
    assert len(before["input_ids"])
    assert dataset.bad.count == 4


def test_validation(make: Make) -> None:
    dataset = make(val_rate=0.25)
    assert (len(dataset), len(dataset.validation)) == (15, 5)
    assert sorted([*dataset.numbers, *dataset.validation.numbers]) == list(range(20))
    again = make(val_rate=0.25, val_max_samples=2, neat_packing=True)
    assert again.validation.numbers.tolist() == dataset.validation.numbers.tolist()[:2]
    assert "document_ids" not in again.validation[0]
    Path("val.json").write_text(json.dumps([row(99)]))
    dataset = make(val_dataset="val.json")
    assert (len(dataset), len(dataset.validation), dataset.validation.validation) == (20, 1, None)
    with pytest.raises(DataError, match=r"val_rate 0.9 holds back 1 of the 1 conversations"):
        make(1, val_rate=0.9)


def test_lengths_that_disagree(make: Make) -> None:
    with pytest.raises(DataError, match="cutoff_len is 64, but --seq-length 160; write one of them"):
        make(cutoff_len=64)
    assert make(cutoff_len=64, length=None).encoder.cutoff == 64
    assert make(length=None).encoder.cutoff == 1024


@pytest.mark.parametrize("basic", [{}, {"neat_packing": True}])
def test_resume(make: Make, basic: dict[str, Any]) -> None:
    whole, _ = batches(make(**basic), 12, shuffle=True)
    rest, _ = batches(make(**basic), 8, consumed=8, shuffle=True)
    assert all(map(same, whole[4:], rest))


# -- streams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basic", [{}, {"neat_packing": True}, {"max_samples": 11}])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_where_it_was(make: Make, basic: dict[str, Any], workers: int) -> None:
    rows: list[Any] = [row(i) for i in range(23)]
    rows[4] = {"conversations": []}

    def stream() -> Any:
        return make(rows, streaming=True, max_bad_samples=50, **basic)

    whole, _ = batches(stream(), 20, workers=workers)
    _, loader = batches(stream(), 9, workers=workers)
    rest, _ = batches(stream(), 11, consumed=18, position=loader.state_dict(), workers=workers)
    assert all(map(same, whole[9:], rest))


def test_what_no_tokenizer_takes_is_named(make: Make) -> None:
    """Texts outside of contents reach it through the chat template."""
    tool = {"name": "look", "description": "\ud800", "parameters": {}}
    with pytest.raises(DataError, match=r"chats.jsonl:2 .*half of a surrogate pair"):
        make([row(0), {**row(1), "tools": [tool]}], attr={"tools": "tools"}, max_bad_samples=0)


def test_a_picture_that_was_missing_is_used_when_it_is_there(make: Make) -> None:
    rows = [row(i, "late.png" if i == 2 else None) for i in range(6)]
    assert make(rows, cache_dir="cache").prepared.lengths[2] == 0
    Image.new("L", (32, 32)).save("late.png")
    after = make(rows, cache_dir="cache")
    assert after.prepared.lengths[2] > 0
    assert after.bad.count == 0


def test_a_stream_deals_every_row_once(make: Make) -> None:
    stream = make(23, streaming=True)
    plain = make(23)
    items = list(stream)
    assert len(items) == 23
    assert all(same(items[i], plain[i]) for i in range(23))
    shards = [list(stream.shard(3, i)) for i in range(3)]
    assert [len(shard) for shard in shards] == [8, 8, 7]
    assert all(same(item, plain[3 * n + i]) for i, shard in enumerate(shards) for n, item in enumerate(shard))
    packed = list(make(23, streaming=True, neat_packing=True))
    assert torch.equal(
        torch.cat([p["input_ids"] for p in packed]), torch.cat([i["input_ids"] for i in items])
    )
    assert all(len(p["input_ids"]) <= LENGTH for p in packed)


def test_what_a_stream_refuses(make: Make) -> None:
    rows: list[Any] = [row(i) for i in range(23)]
    rows[4] = rows[5] = {"conversations": []}
    with pytest.raises(
        DataError, match=r"2 of the 6 conversations read so far .* \(1\): chats.jsonl:5 .*; chats.jsonl:6 "
    ):
        list(make(rows, streaming=True))
    Path("list.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"list.json is a JSON list, and a stream is read line by line"):
        make(rows, streaming=True, dataset="list.json")
    with pytest.raises(Exception, match="a stream has no number of samples"):
        make(rows, streaming=True, val_rate=0.1)
