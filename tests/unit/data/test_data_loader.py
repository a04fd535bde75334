from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import WriteVideo

from mm_core.config.data import DataConfig
from mm_core.data import DataError, T2VDataset, build_loader
from mm_core.data.cache import ClipCache
from mm_core.data.collate import collate
from mm_core.data.loader import MicroBatches

Fields = dict[str, Any]


def data_config(**loader: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset_param": {"dataset_type": "t2v"}, "dataloader_param": loader})


def build(dataset: Any, loader: Fields | None = None, **layout: int) -> MicroBatches:
    sizes = {
        "seed": 5,
        "dp_rank": 0,
        "dp_size": 1,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "num_workers": 0,
        "consumed_samples": 0,
    }
    return build_loader(dataset, data_config(shuffle=True, **(loader or {})), **(sizes | layout))


def take(dataset: Any, count: int, loader: Fields | None = None, **layout: int) -> list[Fields]:
    return list(islice(build(dataset, loader, **layout), count))


def same(left: list[Fields], right: list[Fields]) -> bool:
    def rows(batches: list[Fields]) -> list[tuple[Any, ...]]:
        keys = sorted(batches[0])
        return [tuple(batch[key][i] for key in keys) for batch in batches for i in range(len(batch["file"]))]

    pairs = list(zip(rows(left), rows(right), strict=True))
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for one, other in pairs
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def varied(write_video: WriteVideo, make_set: Any) -> T2VDataset:
    """Five videos with every choice open: frames, captions, dropout."""
    items = []
    for number in range(5):
        write_video(f"{number}.mp4", frames=10 + number)
        items.append({"path": f"{number}.mp4", "cap": [f"video {number}", f"film {number}"]})
    return T2VDataset(seed=5, **make_set(items, cfg=0.3))


def test_a_batch_is_what_the_trainer_expects(t2v_fields: Fields) -> None:
    (batch,) = take(T2VDataset(seed=0, **t2v_fields), 1)
    assert batch["video"].shape == (2, 3, 8, 48, 64)
    assert batch["video"].dtype == torch.float32
    for key in ("prompt_ids", "prompt_mask"):
        assert batch[key].shape == (2, 32)
        assert batch[key].dtype == torch.int64
    assert batch["sample_index"].tolist() == [0, 1]
    assert batch["sample_index"].dtype == torch.int64
    assert {Path(file).stem for file in batch["file"]} == {"bunny", "tower"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(varied: T2VDataset, workers: int) -> None:
    assert same(take(varied, 8), take(varied, 8, num_workers=workers, loader={"prefetch_factor": 3}))


def test_ranks_and_micro_batches_change_nothing(varied: T2VDataset) -> None:
    whole = take(varied, 6, micro_batch_size=4)
    small = take(varied, 24, micro_batch_size=1)
    assert same(whole, small)
    ranks = [take(varied, 6, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert same(whole, [batch for pair in zip(*ranks, strict=True) for batch in pair])


@pytest.mark.parametrize(
    ("workers", "sampler"), [(0, {"sampler_type": "BaseRandomBatchSampler", "drop_last": True}), (2, {})]
)
def test_a_resumed_stream_goes_on_exactly(varied: T2VDataset, workers: int, sampler: Fields) -> None:
    """In the middle of an epoch, in the middle of a batch that two epochs share, and on other ranks than before."""
    whole = take(varied, 10, loader=sampler)
    assert same(whole, take(varied, 10))  # a random sampler shuffles, and no sample is left out
    assert same(whole[6:], take(varied, 4, loader=sampler, consumed_samples=12, num_workers=workers))
    ranks = [
        take(varied, 4, loader=sampler, consumed_samples=4, dp_rank=rank, dp_size=2, micro_batch_size=1)
        for rank in range(2)
    ]
    pairs = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert same(whole[2:6], pairs)


def test_the_stream_has_no_end_and_every_epoch_all_samples(varied: T2VDataset) -> None:
    batches = take(varied, 25, micro_batch_size=1, global_batch_size=1)
    files = [batch["file"][0] for batch in batches]
    epochs = [files[start : start + 5] for start in range(0, 25, 5)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_sequential_sampling_keeps_the_order(varied: T2VDataset) -> None:
    loader = build_loader(
        varied,
        data_config(sampler_type="SequentialSampler"),
        seed=5,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=5,
        global_batch_size=5,
    )
    files = [Path(file).stem for file in next(iter(loader))["file"]]
    assert files == ["0", "1", "2", "3", "4"]


def test_clips_of_different_size_are_named_before_they_meet(write_video: WriteVideo, make_set: Any) -> None:
    write_video("wide.mp4", height=32, width=64)
    write_video("square.mp4", height=48, width=48)
    items = [{"path": name, "cap": "x"} for name in ("wide.mp4", "square.mp4")]
    dataset = T2VDataset(
        seed=0, **make_set(items, force_resolution=False, max_hxw=2048, hw_stride=8, hw_aspect_thr=3.0)
    )
    message = r"2 shapes, .*: 4×32×64 \(1\), 4×40×40 \(1\); a micro batch of 2 must have one: set group_data"
    with pytest.raises(DataError, match=message):
        take(dataset, 1)
    with pytest.raises(
        DataError, match=r"video of .*wide\.mp4 is \[3, 4, 32, 64\], but of .*square\.mp4 \[3"
    ):
        collate([dataset[0], dataset[1]])
    sizes = {tuple(batch["video"].shape[-2:]) for batch in take(dataset, 2, micro_batch_size=1)}
    assert sizes == {(32, 64), (40, 40)}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_keeps_its_message(
    write_video: WriteVideo, make_set: Any, tmp_path: Path, workers: int
) -> None:
    write_video("a.mp4")
    dataset = T2VDataset(seed=0, **make_set([{"path": "a.mp4", "cap": "x"}]))
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        take(dataset, 1, num_workers=workers)
    assert str(caught.value) == (
        f"{tmp_path / 'data.txt'}: none of its 1 samples can be read: {tmp_path / 'a.mp4'}: the file is empty"
    )


@pytest.mark.timeout(120)
def test_workers_share_the_account_of_bad_samples(
    write_video: WriteVideo, make_set: Any, tmp_path: Path
) -> None:
    names = [f"{number}.mp4" for number in range(6)]
    for name in names:
        write_video(name)
    fields = make_set([{"path": name, "cap": "x"} for name in names])
    dataset = T2VDataset(seed=0, **fields, max_bad_samples=2, clip_cache_bytes=0)
    for name in names[:3]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 6 samples cannot be read, more than max_bad_samples \(2\)"):
        take(dataset, 12, num_workers=2)


class Stuck(torch.utils.data.Dataset[Fields]):
    """Its first sample comes at once, all others never."""

    def __len__(self) -> int:
        return 4

    def get(self, index: int, key: int) -> Fields:
        if key > 0:
            time.sleep(1000)
        return {"file": str(index)}


def one_worker() -> Any:
    (worker,) = multiprocessing.active_children()
    return worker


@pytest.mark.timeout(60)
def test_a_worker_outlives_a_signal_to_the_whole_job(varied: T2VDataset) -> None:
    alone = take(varied, 6)
    stream = iter(build(varied, num_workers=1))
    batches = [next(stream)]
    for _ in range(2):
        # Another process sends it, as a scheduler does.
        subprocess.run(["kill", "-TERM", str(one_worker().pid)], check=True)
        batches.append(next(stream))
    time.sleep(0.2)
    assert one_worker().is_alive()
    assert same(alone, batches + list(islice(stream, 3)))


@pytest.mark.timeout(60)
def test_a_worker_that_hangs_ends_when_its_owner_says_so() -> None:
    stream = iter(build(Stuck(), micro_batch_size=1, global_batch_size=1, num_workers=1))
    next(stream)
    worker = one_worker()
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    code = worker.exitcode
    worker.kill()  # else a failure here would keep the test runner from leaving
    assert code == 0


@pytest.mark.timeout(90)
def test_a_program_whose_worker_hangs_can_end(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_data_loader import Stuck, build\n"
        "stream = iter(build(Stuck(), micro_batch_size=1, global_batch_size=1, num_workers=2))\n"
        "print(next(stream)['sample_index'].tolist())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[0]\n"), done.stderr


def test_a_plain_map_style_dataset_works_too() -> None:
    class Numbers(torch.utils.data.Dataset[Fields]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Fields:
            return {"x": torch.tensor([index]), "weight": 0.5 * index, "file": f"{index}"}

    batches = take(Numbers(), 2)
    assert sorted(int(x) for batch in batches for x in batch["x"]) == [0, 1, 2, 3]
    assert [batch["sample_index"].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert batches[0]["weight"].tolist() == [0.5 * int(x) for x in batches[0]["x"]]


def test_a_dataset_can_be_sent_to_spawned_workers(varied: T2VDataset) -> None:
    copy = pickle.loads(pickle.dumps(varied))
    assert same(take(varied, 2), take(copy, 2))


def test_an_iterable_without_a_position_is_refused() -> None:
    with pytest.raises(DataError, match="generator is an iterable dataset without state_dict"):
        take((i for i in range(3)), 1)


def test_collate_keeps_what_cannot_be_stacked() -> None:
    batch = collate([{"a": torch.zeros(2), "n": 1, "s": "x"}, {"a": torch.ones(2), "n": 2, "s": "y"}])
    assert batch["a"].tolist() == [[0, 0], [1, 1]]
    assert batch["n"].tolist() == [1, 2]
    assert batch["s"] == ["x", "y"]


def test_the_cache_stays_within_its_budget() -> None:
    cache = ClipCache(max_bytes=100)
    clips = {
        name: torch.full((10,), index, dtype=torch.float32) for index, name in enumerate("abc")
    }  # 40 bytes each
    cache.put("a", clips["a"])
    cache.put("b", clips["b"])
    assert cache.get("a") is clips["a"]  # b is now the older one
    cache.put("c", clips["c"])
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (clips["a"], None, clips["c"])
    assert cache.bytes == 80
    cache.put("huge", torch.zeros(100))
    assert cache.get("huge") is None
    cache.put("a", clips["a"])
    assert cache.bytes == 80
