"""The batches of a validation set: every sample once, in the same order and with the same randomness each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mm_core.data.collate import Batch, Item, collate
from mm_core.data.errors import DataError
from mm_core.data.loader import SlotCollate, Slots, loader_settings
from mm_core.data.order import Slot
from mm_core.data.streams import Failure, is_streamed
from mm_core.random import keyed_generator

if TYPE_CHECKING:
    from mm_core.config.data import DataConfig


class ValidationBatches:
    """One data-parallel rank's share of a validation set; each `iter()` reads it from its beginning.

    Sample k is in micro batch k // `micro_batch_size` (counted within its bucket, if the dataset has some, so that the clips of
    one micro batch have one shape), and these are dealt to the ranks in turn, so that they are the same
    ones for any number of ranks; the last one may be smaller.

    Yields `(batch, samples)`: a batch as of `mm_core.data.loader.MicroBatches`, and how many samples of the set it has. Of a
    set that can be indexed every rank gets as many batches, so that all of them call the model as often: a rank for which
    none is left gets one of sample 0 once more, with `samples` 0, and that one does not count. Ranks that read a stream
    may get different numbers of batches.

    Args:
        dataset: map-style or iterable, as for `build_loader`; with `collate_fn` it stacks its own batches.
        data: `dataloader_param` says about prefetching and pinned memory. Nothing is shuffled.
        seed: of samples that draw.
        limit: samples that are used, the first ones; `None` for all of them. Of a stream each rank takes its share of them,
            rounded up.

    Raises:
        DataError: the set is empty, or a stream without a position.
    """

    def __init__(
        self,
        dataset: Any,
        data: DataConfig,
        *,
        seed: int,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        num_workers: int = 0,
        limit: int | None = None,
    ) -> None:
        self.dataset, self.seed, self.dp_rank, self.dp_size = dataset, seed, dp_rank, dp_size
        self.micro_batch_size, self.limit = micro_batch_size, limit
        self.streamed = is_streamed(dataset)
        self._settings = loader_settings(data, num_workers)
        self._collate: Callable[[Sequence[Item]], Batch] = getattr(dataset, "collate_fn", None) or collate
        self.size: int | None = None
        self._micro: list[list[int]] = []
        if not self.streamed:
            if not len(dataset):
                raise DataError("the validation set has no sample")
            self.size = len(dataset) if limit is None else min(limit, len(dataset))
            self._micro = self._micro_batches(self.size)

    def __len__(self) -> int:
        """Batches of each rank.

        Raises:
            TypeError: of a stream, which does not tell.
        """
        if self.size is None:
            raise TypeError("a stream does not tell how many batches it has")
        return -(-len(self._micro) // self.dp_size)

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        return self._read_stream() if self.streamed else self._read()

    def _read(self) -> Iterator[tuple[Batch, int]]:
        assert self.size is not None
        shares = [self._share(number) for number in range(len(self))]
        loader: DataLoader[Any] = DataLoader(
            Slots(self.dataset, self.seed),
            batch_sampler=_Batches([share or [(0, 0)] for share in shares]),
            collate_fn=SlotCollate(self._collate),
            # Its own seed: torch's would be drawn from the generator of module dropout.
            generator=keyed_generator(self.seed, "workers", self.dp_rank),
            **self._settings,
        )
        for batch, share in zip(loader, shares, strict=True):
            yield _whole(batch), len(share)

    def _micro_batches(self, size: int) -> list[list[int]]:
        """The samples of each micro batch of the set, in order; those of one are of one bucket."""
        bucket = getattr(self.dataset, "bucket", None)
        by_bucket: dict[Any, list[int]] = {}
        for k in range(size):
            by_bucket.setdefault(None if bucket is None else bucket(k), []).append(k)
        micro = self.micro_batch_size
        return [same[at : at + micro] for same in by_bucket.values() for at in range(0, len(same), micro)]

    def _share(self, number: int) -> list[Slot]:
        place = number * self.dp_size + self.dp_rank
        return [(k, k) for k in self._micro[place]] if place < len(self._micro) else []

    def _read_stream(self) -> Iterator[tuple[Batch, int]]:
        left = None if self.limit is None else -(-self.limit // self.dp_size)
        loader: DataLoader[Any] = DataLoader(
            _Once(self.dataset, self.dp_rank, self.dp_size),
            batch_size=self.micro_batch_size,
            collate_fn=_StreamCollate(self._collate),
            generator=keyed_generator(self.seed, "workers", self.dp_rank),
            **self._settings,
        )
        for batch in loader:
            _whole(batch)
            samples = len(batch["sample_index"])
            if left is not None:
                left -= samples
            yield batch, samples
            if left is not None and left <= 0:
                return


def _whole(batch: Batch | Failure) -> Batch:
    if isinstance(batch, Failure):
        raise batch.error
    return batch


class _Batches:
    """The batches that are to be read, for torch's loader."""

    def __init__(self, batches: list[list[Slot]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Slot]]:
        return iter(self.batches)


class _Once(IterableDataset[Any]):
    """One epoch of a process's share of a stream, as (number, item)."""

    def __init__(self, dataset: Any, dp_rank: int, dp_size: int) -> None:
        self.dataset, self.dp_rank, self.dp_size = dataset, dp_rank, dp_size

    def __iter__(self) -> Iterator[tuple[int, Item] | Failure]:
        worker = get_worker_info()
        workers, place = (worker.num_workers, worker.id) if worker else (1, 0)
        shares, index = self.dp_size * workers, self.dp_rank * workers + place
        dataset, keep = self.dataset, (index, shares)
        if hasattr(dataset, "shard"):
            dataset, keep = dataset.shard(shares, index), (0, 1)
        try:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(0)
            for number, item in enumerate(dataset):
                if number % keep[1] == keep[0]:
                    # What is keyed by it differs from sample to sample, on all processes.
                    yield (number * shares + index if keep[1] == 1 else number), item
        except DataError as error:
            yield Failure(error)


class _StreamCollate:
    """Collation of numbered items; an object, so that workers can be spawned."""

    def __init__(self, function: Callable[[Sequence[Item]], Batch]) -> None:
        self.function = function

    def __call__(self, items: list[Any]) -> Batch | Failure:
        failed = next((item for item in items if isinstance(item, Failure)), None)
        if failed is not None:
            return failed
        try:
            batch = self.function([item for _, item in items])
        except DataError as error:
            return Failure(error)
        return {**batch, "sample_index": torch.tensor([number for number, _ in items], dtype=torch.int64)}
