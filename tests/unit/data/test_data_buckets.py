"""Buckets: the laws of their order, and what loaders make of clips of several shapes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import WriteVideo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_core.config.data import DataConfig
from mm_core.data import DataError, T2VDataset, build_loader
from mm_core.data.buckets import BucketedOrder, BySize, ClipShape
from mm_core.data.order import MicroBatchSampler

BUCKETS = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def epoch(order: BucketedOrder, number: int) -> list[int]:
    return [order[number * order.size + k] for k in range(order.size)]


def fits(buckets: list[int], micro: int) -> bool:
    return max(Counter(buckets).values()) >= micro


@settings(max_examples=40, deadline=None)
@given(
    buckets=BUCKETS, micro=st.integers(1, 5), seed=st.integers(0, 2**31), number=st.integers(0, 3), shuffle=st.booleans()
)  # fmt: skip
def test_the_laws_of_an_epoch(buckets: list[int], micro: int, seed: int, number: int, shuffle: bool) -> None:
    if not fits(buckets, micro):
        with pytest.raises(DataError, match="none fills a micro batch"):
            BucketedOrder(buckets, seed, micro_batch_size=micro, shuffle=shuffle)
        return
    order = BucketedOrder(buckets, seed, micro_batch_size=micro, shuffle=shuffle)
    indices = epoch(order, number)
    # Each sample at most once; of each bucket as many as fill micro batches; the others are told.
    assert max(Counter(indices).values()) == 1
    counts = Counter(buckets)
    used = Counter(buckets[i] for i in indices)
    assert used == {b: n // micro * micro for b, n in counts.items() if n >= micro}
    assert counts == used + Counter(order.left_out)
    # One bucket to a micro batch.
    for at in range(0, len(indices), micro):
        assert len({buckets[i] for i in indices[at : at + micro]}) == 1
    # A function of seed, epoch and micro batch: another object, asked in another order, says the same.
    again = BucketedOrder(buckets, seed, micro_batch_size=micro, shuffle=shuffle)
    for k in reversed(range(order.size)):
        assert again[number * order.size + k] == indices[k]


@settings(max_examples=25, deadline=None)
@given(
    buckets=BUCKETS, micro=st.integers(1, 4), ranks=st.integers(1, 4), accumulation=st.integers(1, 3),
    done=st.integers(0, 3), sized=st.booleans(),
)  # fmt: skip
def test_any_ranks_and_a_resume_consume_the_same_micro_batches(
    buckets: list[int], micro: int, ranks: int, accumulation: int, done: int, sized: bool
) -> None:
    if not fits(buckets, micro):
        return
    order = BucketedOrder(buckets, 3, micro_batch_size=micro)
    global_batch = ranks * micro * accumulation

    def dealt(ranks: int, steps: int, start: int) -> list[list[list[tuple[int, int]]]]:
        """The micro batches of each step, in the order in which ranks do them."""
        sizes: dict[str, Any] = {
            "dp_size": ranks, "micro_batch_size": micro, "global_batch_size": global_batch, "consumed_samples": start,
        }  # fmt: skip
        samplers = [
            iter(
                BySize(order, buckets.__getitem__, dp_rank=rank, **sizes)
                if sized
                else MicroBatchSampler(order, dp_rank=rank, **sizes)
            )
            for rank in range(ranks)
        ]
        rounds = global_batch // (ranks * micro)
        return [[next(s) for _ in range(rounds) for s in samplers] for _ in range(steps)]

    steps = dealt(ranks, done + 3, 0)
    assert dealt(1, done + 3, 0) == steps
    assert dealt(ranks, 3, done * global_batch) == steps[done:]
    for number, step in enumerate(steps):
        first = number * global_batch
        assert sorted(k for part in step for _, k in part) == list(range(first, first + global_batch))
        assert all(index == order[k] for part in step for index, k in part)
        assert all(len({buckets[i] for i, _ in part}) == 1 for part in step)
        if sized:
            sums = [sum(buckets[i] for i, _ in part) for part in step]
            assert sums == sorted(sums, reverse=True)


def test_epochs_differ_in_order_and_in_what_stays_out() -> None:
    order = BucketedOrder([0] * 11 + [1] * 7, seed=1, micro_batch_size=2)
    epochs = [epoch(order, number) for number in range(12)]
    assert len({tuple(indices) for indices in epochs}) == 12
    assert len({frozenset(range(18)) - frozenset(indices) for indices in epochs}) > 6
    # Micro batches of the small bucket come early as well as late.
    places = [at // 2 for indices in epochs for at in range(0, 16, 2) if indices[at] >= 11]
    assert min(places) == 0
    assert max(places) == 7


def test_without_shuffling_a_micro_batch_comes_when_it_is_full() -> None:
    order = BucketedOrder(["a", "b", "a", "b", "b", "a"], seed=9, micro_batch_size=2, shuffle=False)
    assert [order[k] for k in range(8)] == [0, 2, 1, 3, 0, 2, 1, 3]
    assert order.left_out == {"a": 1, "b": 1}


def data_config(**loader: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset_param": {"dataset_type": "t2v"}, "dataloader_param": loader})


def loader(
    dataset: Any, micro: int = 2, ranks: int = 1, rank: int = 0, start: int = 0, **options: Any
) -> Any:
    return build_loader(
        dataset, data_config(**options), seed=5, dp_rank=rank, dp_size=ranks, micro_batch_size=micro,
        global_batch_size=4, consumed_samples=start,
    )  # fmt: skip


@pytest.fixture
def mixed(write_video: WriteVideo, make_set: Callable[..., Any], tmp_path: Path) -> dict[str, Any]:
    """Five wide videos, three square ones, a short one, three images."""
    items = []
    for number in range(9):
        side = 48 if 5 <= number < 8 else 32
        frames = 3 if number == 8 else 12
        name = f"v{number}.mp4"
        write_video(name, frames=frames, height=side, width=48 if side == 48 else 64)
        items.append({"path": name, "cap": f"video {number}"})
    for number in range(3):
        Image.new("RGB", (64, 32), (50 * number, 0, 255)).save(tmp_path / f"i{number}.png")
        items.append({"path": f"i{number}.png", "cap": f"image {number}"})
    return make_set(
        items, force_resolution=False, max_hxw=2048, hw_stride=8, hw_aspect_thr=3.0, num_frames=5,
        drop_short_ratio=0.0, min_num_frames=1,
    )  # fmt: skip


def test_videos_of_several_sizes_and_images_share_a_set(
    mixed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    dataset = T2VDataset(seed=0, **mixed)
    shapes = [dataset.bucket(index) for index in range(len(dataset))]
    assert Counter(map(str, shapes)) == {"5×32×64": 5, "5×40×40": 3, "1×32×64": 4}
    for index, shape in enumerate(shapes):
        assert tuple(dataset[index]["video"].shape[1:]) == shape
    blue = dataset[11]["video"][:, 0, 0, 0]
    assert torch.allclose(blue, torch.tensor([100 / 127.5 - 1, -1.0, 1.0]), atol=1e-6)
    with caplog.at_level(logging.INFO, logger="mm_core.data.buckets"):
        batches = list(islice(loader(dataset, group_data=True, shuffle=True), 5))
    assert "12 samples in 3 buckets: 5×32×64 (5), 1×32×64 (4), 5×40×40 (3)" in caplog.text
    assert "2 of 12 samples stay out of an epoch (others each epoch)" in caplog.text
    found = Counter(tuple(batch["video"].shape) for batch in batches)
    assert found == {(2, 3, 5, 32, 64): 2, (2, 3, 1, 32, 64): 2, (2, 3, 5, 40, 40): 1}
    assert len({file for batch in batches for file in batch["file"]}) == 10


def test_a_length_grouped_sampler_gives_ranks_clips_of_one_size_at_a_time(mixed: dict[str, Any]) -> None:
    dataset = T2VDataset(seed=0, **mixed)
    options = {"sampler_type": "LengthGroupedSampler", "shuffle": True}

    def step(start: int) -> list[int]:
        parts = [islice(loader(dataset, 1, 2, rank, start, **options), 2) for rank in range(2)]
        return [int(b["video"].numel()) for pair in zip(*parts, strict=True) for b in pair]

    for start in (0, 4, 8):
        volumes = step(start)
        assert volumes == sorted(volumes, reverse=True)


def test_what_cannot_be_grouped_is_said(mixed: dict[str, Any]) -> None:
    dataset = T2VDataset(seed=0, **mixed)
    with pytest.raises(
        DataError, match=r"3 shapes, .* a micro batch of 2 must have one: set group_data to true"
    ):
        loader(dataset)
    with pytest.raises(DataError, match="3 shapes"):  # frames alone are not enough
        loader(dataset, group_frame=True)
    with pytest.raises(DataError, match="consumed 1 samples, no multiple of the micro batch size 2"):
        loader(dataset, group_data=True, start=1)
    unsized = torch.utils.data.TensorDataset(torch.zeros(4))
    with pytest.raises(DataError, match=r"TensorDataset has no `bucket`.*set them to false"):
        loader(unsized, group_data=True)
    with pytest.raises(DataError, match=r"TensorDataset has no `bucket`.*stateful_distributed_sampler"):
        loader(unsized, sampler_type="LengthGroupedSampler")


def test_a_sample_that_cannot_be_read_is_replaced_by_one_of_its_shape(
    mixed: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "v2.mp4").write_bytes(b"")  # noticed while it is selected
    dataset = T2VDataset(seed=0, **mixed, max_bad_samples=4)
    (tmp_path / "v6.mp4").write_bytes(b"none")  # and while it is read
    for index in (2, 6):
        shape = dataset.bucket(index)
        assert all(tuple(dataset.get(index, key)["video"].shape[1:]) == shape for key in range(6))
    assert dataset.bad.count == 2


def test_an_annotation_that_lies_about_the_size_is_a_bad_sample(
    write_video: WriteVideo, make_set: Callable[..., Any]
) -> None:
    write_video("a.mp4", height=48, width=48)
    write_video("b.mp4")
    facts = {"num_frames": 12, "fps": 10, "resolution": {"height": 32, "width": 64}}
    items = [{"path": f"{name}.mp4", "cap": "x", **facts} for name in "ab"]
    fields = make_set(items, force_resolution=False, max_hxw=2048, hw_stride=8, hw_aspect_thr=3.0)
    dataset = T2VDataset(seed=0, **fields)
    assert dataset.bucket(0) == ClipShape(4, 32, 64)
    assert Path(dataset[0]["file"]).name == "b.mp4"
    with pytest.raises(
        DataError, match=r"annotation \(.*json:1\) promises a clip of 4×32×64 .* gives one of 4×40×40"
    ):
        T2VDataset(seed=0, **fields, max_bad_samples=0)[0]
