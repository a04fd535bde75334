"""Buckets: samples that give clips of one shape, which alone can share a micro batch.

The bucketed order fills micro batches bucket by bucket: it depends on the seed, the epoch and the size of a micro batch
(MBS), and on nothing else: not on ranks, workers, or where a run was resumed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mm_core.data.errors import DataError
from mm_core.data.order import GlobalOrder, Slot, check_sizes
from mm_core.random import keyed_generator

if TYPE_CHECKING:
    from mm_core.config.data import DataloaderConfig

logger = logging.getLogger(__name__)

_SHOWN = 8  # buckets in one line of a log


class ClipShape(NamedTuple):
    """Frames, and height and width in pixels, of the clip that a sample gives."""

    frames: int
    height: int
    width: int

    @property
    def volume(self) -> int:
        """Pixels of all frames: what a clip costs, near enough."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames}×{self.height}×{self.width}"


class BucketedOrder(GlobalOrder):
    """The global order in which each MBS samples, from a multiple of MBS on, are of one bucket.

    An epoch is the largest multiple of MBS of each bucket, each sample at most once: what does not fill a micro batch
    stays out of the epoch. With `shuffle` each epoch draws anew which samples share a micro batch, which stay out, and
    the order of the micro batches. Without, a micro batch comes where its last sample stands in the set, and the last
    samples of a bucket stay out.

    Args:
        buckets: the bucket of each sample of the set.
        micro_batch_size: MBS.

    Attributes:
        size: samples of an epoch.
        left_out: samples of an epoch that stay out, by bucket.

    Raises:
        DataError: no bucket fills a micro batch.
    """

    def __init__(
        self, buckets: Sequence[Hashable], seed: int, *, micro_batch_size: int, shuffle: bool = True
    ) -> None:
        counts = Counter(buckets)
        self.left_out = {b: n % micro_batch_size for b, n in counts.items() if n % micro_batch_size}
        size = len(buckets) - sum(self.left_out.values())
        if buckets and not size:
            raise DataError(
                f"no bucket of the set has {micro_batch_size} samples, so that none fills a micro batch: "
                f"{shown(counts)}; use a smaller --micro-batch-size, or make clips more alike (force_resolution, "
                "hw_stride, drop_short_ratio)"
            )
        super().__init__(size, seed, shuffle=shuffle)
        self.micro_batch_size = micro_batch_size
        numbers = {bucket: number for number, bucket in enumerate(counts)}
        self._numbers = torch.tensor([numbers[bucket] for bucket in buckets], dtype=torch.int64)
        self._counts = torch.tensor(list(counts.values()), dtype=torch.int64)
        # Of a set that is not shuffled every epoch is the first.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __getitem__(self, consumed: int) -> int:
        """Return the dataset index of the `consumed`-th sample of the run."""
        if consumed < 0:
            raise IndexError(f"consumed-sample indices start at 0, not at {consumed}")
        epoch, position = divmod(consumed, self.size)
        return int(self._epoch(epoch if self.shuffle else 0)[position])

    def _draw_epoch(self, epoch: int) -> torch.Tensor:
        """Return the dataset indices of an epoch, `[size]`."""
        total, micro = len(self._numbers), self.micro_batch_size
        generator = keyed_generator(self.seed, "order", epoch)
        drawn = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        by_bucket = torch.argsort(self._numbers[drawn], stable=True)  # positions in `drawn`
        first = (self._counts.cumsum(0) - self._counts).repeat_interleave(self._counts)
        full = (self._counts // micro * micro).repeat_interleave(self._counts)
        kept = by_bucket[torch.arange(total) - first < full].view(-1, micro)
        kept = (
            kept[torch.randperm(len(kept), generator=generator)]
            if self.shuffle
            else kept[torch.argsort(kept[:, -1])]
        )
        return drawn[kept.flatten()]


class BySize:
    """Yield without end, for one data-parallel rank, the slots of its micro batches, as `MicroBatchSampler` does, but deal
    those of one optimizer step by their clips' volume, largest first: what the ranks do at the same time is then about
    the same work. Which samples a step has, and the index of each, stay as they are.

    Args:
        volume: of a dataset index: what a sample costs, in any unit.
        others: those of `MicroBatchSampler`.

    Raises:
        DataError: the sizes do not fit.
    """

    def __init__(
        self,
        order: GlobalOrder,
        volume: Callable[[int], int],
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        global_batch_size: int,
        consumed_samples: int = 0,
    ) -> None:
        check_sizes(micro_batch_size, global_batch_size, dp_size)
        self.order = order
        self.volume = volume
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[list[Slot]]:
        first, micro = self.consumed_samples, self.micro_batch_size
        while True:
            step = [(self.order[k], k) for k in range(first, first + self.global_batch_size)]
            parts = [step[at : at + micro] for at in range(0, len(step), micro)]
            # Stable: among equals the global order stays.
            parts.sort(key=lambda part: -sum(self.volume(index) for index, _ in part))
            yield from parts[self.dp_rank :: self.dp_size]
            first += self.global_batch_size


def build_order(
    dataset: Any, options: DataloaderConfig, seed: int, micro_batch_size: int, *, stacked: bool = True
) -> GlobalOrder:
    """Return the global order that `dataloader_param` asks for.

    Args:
        dataset: map-style, perhaps with `bucket(index)`.
        stacked: whether the tensors of a micro batch must have one shape.

    Raises:
        DataError: samples are to be grouped, but their sizes are not known; or they are not to be, and have different
            shapes that cannot share a micro batch.
    """
    shuffle = options.shuffle and options.sampler_type != "SequentialSampler"
    axes = options.grouped_axes()
    bucket = getattr(dataset, "bucket", None)
    if axes and bucket is None:
        raise DataError(
            f"{type(dataset).__name__} has no `bucket`: it does not know the sizes of its samples, and group_data, "
            "group_frame and group_resolution cannot group them; set them to false"
        )
    plain = GlobalOrder(len(dataset), seed, shuffle=shuffle)
    if micro_batch_size == 1 or bucket is None:
        return plain
    shapes: list[ClipShape | None] = [bucket(index) for index in range(len(dataset))]
    name = str(getattr(dataset, "name", type(dataset).__name__))
    keys = [shape if shape is None else _part(shape, axes) for shape in shapes]
    mixed = {key: rest for key, rest in _mixed(keys, shapes).items() if len(rest) > 1}
    if mixed and stacked:
        raise DataError(
            f"{name} gives clips of {len(set(shapes))} shapes, frames × height × width: {shown(Counter(shapes))}; a micro "
            f"batch of {micro_batch_size} must have one: set group_data to true, force_resolution to true with "
            "drop_short_ratio 1.0, or --micro-batch-size 1"
        )
    if not axes:
        return plain
    order = BucketedOrder(keys, seed, micro_batch_size=micro_batch_size, shuffle=shuffle)
    _report(name, order, Counter(keys), len(shapes))
    return order


def by_size(dataset: Any, options: DataloaderConfig) -> Callable[[int], int] | None:
    """Return what each sample costs, if the micro batches of a step are to be dealt by size (LengthGroupedSampler).

    Raises:
        DataError: the dataset does not know the sizes of its samples.
    """
    if options.sampler_type != "LengthGroupedSampler":
        return None
    bucket = getattr(dataset, "bucket", None)
    if bucket is None:
        raise DataError(
            f"{type(dataset).__name__} has no `bucket`: it does not know the sizes of its samples, and a "
            "LengthGroupedSampler cannot deal them; use stateful_distributed_sampler"
        )

    def volume(index: int) -> int:
        shape = bucket(index)
        return 0 if shape is None else int(shape.volume)

    return volume


def check_position(order: GlobalOrder, consumed_samples: int) -> None:
    """Check that micro batches can begin at the `consumed_samples`-th sample.

    Raises:
        DataError: they would be of several buckets.
    """
    if isinstance(order, BucketedOrder) and consumed_samples % order.micro_batch_size:
        raise DataError(
            f"the run consumed {consumed_samples} samples, no multiple of the micro batch size {order.micro_batch_size}, "
            "and grouped samples are consumed in whole micro batches; use a --micro-batch-size that divides it"
        )


def shown(counts: Counter[Any]) -> str:
    """Return `49×480×832 (12), 1×480×832 (3), …`: buckets with their numbers of samples, the largest first."""
    parts = [f"{_name(bucket)} ({count})" for bucket, count in counts.most_common(_SHOWN)]
    more = len(counts) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def _name(bucket: Any) -> str:
    return "×".join(map(str, bucket)) if isinstance(bucket, tuple) else str(bucket)


def _part(shape: ClipShape, axes: Sequence[str]) -> Hashable:
    return shape if len(axes) == len(shape) else tuple(getattr(shape, axis) for axis in axes)


def _mixed(keys: Sequence[Hashable], shapes: Sequence[Hashable]) -> dict[Hashable, set[Hashable]]:
    found: dict[Hashable, set[Hashable]] = {}
    for key, shape in zip(keys, shapes, strict=True):
        found.setdefault(key, set()).add(shape)
    return found


def _report(name: str, order: BucketedOrder, counts: Counter[Any], total: int) -> None:
    logger.info("%s: %d samples in %d buckets: %s", name, total, len(counts), shown(counts))
    if order.left_out:
        out = Counter(order.left_out)
        again = "others each epoch" if order.shuffle else "the same each epoch"
        logger.warning(
            "%s: %d of %d samples stay out of an epoch (%s), because they fill no micro batch of %d: %s",
            name, out.total(), total, again, order.micro_batch_size, shown(out),
        )  # fmt: skip
