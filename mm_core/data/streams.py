"""Iterable datasets: each rank's share of the stream, without end, and its position for checkpoints.

A map-style dataset needs none of this: its position is the number of consumed samples. A stream cannot be entered in
its middle, so each reading process (a rank, or each of its workers) keeps a position of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from mm_core.data.collate import Batch, Item
from mm_core.data.errors import DataError
from mm_core.data.positions import from_json, to_json
from mm_core.random import keyed_generator


@runtime_checkable
class StreamedDataset(Protocol):
    """An iterable dataset. `load_state_dict` takes what `state_dict` returned after some item: the next `iter()` goes on
    after that one, later ones start again from the beginning.

    It may have `shard(num_shards, index)`, which returns the dataset of every process that reads; without it each
    process reads the whole stream and keeps its share of the items, so the stream must be the same everywhere. It may
    have `set_epoch(epoch)`, called before each `iter()`.
    """

    def __iter__(self) -> Iterator[Item]:
        """One epoch."""

    def state_dict(self) -> Mapping[str, Any]:
        """The position after the last item that was yielded."""

    def load_state_dict(self, state: Any) -> None:
        """Go on from there."""


def is_streamed(dataset: Any) -> bool:
    """Whether a dataset can be iterated only.

    Raises:
        DataError: it can, but has no position to resume from.
    """
    indexed = hasattr(dataset, "__getitem__") or hasattr(dataset, "get")
    if not isinstance(dataset, IterableDataset) and (indexed or not hasattr(dataset, "__iter__")):
        return False
    if not isinstance(dataset, StreamedDataset):
        raise DataError(
            f"{type(dataset).__name__} is an iterable dataset without state_dict and load_state_dict, so that a resumed "
            "run could not go on where it was; add both"
        )
    return True


class StreamedBatches:
    """The endless stream of micro batches of one data-parallel rank; iterate it once. Batches as of `MicroBatches`.

    Args:
        dataset: see `StreamedDataset`.
        collate_fn: makes a batch of items.
        consumed_samples: of the run, over all ranks; it keys the batches' `sample_index`.
        position: from `state_dict()` of the same rank of as many ranks and workers.
        options: of the loader: `batch_size`, `num_workers`, `worker_init_fn`, ….

    Raises:
        DataError: the position cannot be used.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        dp_rank: int,
        dp_size: int,
        collate_fn: Callable[[list[Item]], Any],
        consumed_samples: int,
        position: Any = None,
        **options: Any,
    ) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader  # few jobs need it

        self._first = consumed_samples + dp_rank * options["batch_size"]
        self._stride = dp_size * options["batch_size"]
        self._loader: Any = StatefulDataLoader(
            Endless(dataset, dp_rank, dp_size),
            collate_fn=_Collate(collate_fn),
            # Its own seed: torch's would be drawn from the generator of module dropout, at each start of the run.
            generator=keyed_generator(seed, "stream workers", dp_rank),
            **options,
        )
        self._goes_on = position is not None
        if position is not None:
            self._loader.load_state_dict(from_json(position))

    def state_dict(self) -> Any:
        """The position after the last batch that was taken, JSON-able; what workers read ahead does not count.

        Raises:
            DataError: the dataset's own state holds what JSON cannot.
        """
        return to_json(self._loader.state_dict(), "the loader's state")

    def __iter__(self) -> Iterator[Batch]:
        try:
            batches = iter(self._loader)  # takes the position in
        except (AssertionError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if not self._goes_on:
                raise
            raise DataError(f"the stored position of the data cannot be used: {error}") from error
        for number, batch in enumerate(batches):
            if isinstance(batch, Failure):
                raise batch.error
            first = self._first + number * self._stride
            indices = torch.arange(first, first + self._loader.batch_size, dtype=torch.int64)
            yield {**batch, "sample_index": indices}


class Failure:
    """A `DataError` on its way out of a worker: torch would put the worker's traceback into its message."""

    def __init__(self, error: DataError) -> None:
        self.error = error


class Endless(IterableDataset[Any]):
    """One epoch after the other of a process's share, with its position: epoch, items, the dataset's own state, and a worker's
    generators.
    """

    def __init__(self, dataset: Any, dp_rank: int, dp_size: int) -> None:
        self.dataset, self.dp_rank, self.dp_size = dataset, dp_rank, dp_size
        self._own: Any = None  # the dataset's shard, in the process that reads
        self._epoch = self._seen = 0
        self._goes_on = False

    def _open(self) -> tuple[Any, int, int]:
        """The dataset, and which of its items are kept: those with number `index` modulo `shares`."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shares, index = self.dp_size * workers, self.dp_rank * workers + number
        if not hasattr(self.dataset, "shard"):
            self._own = self.dataset
            return self._own, index, shares
        if self._own is None:
            self._own = self.dataset.shard(shares, index)
        return self._own, 0, 1

    def __iter__(self) -> Iterator[Any]:
        dataset, index, shares = self._open()
        while True:
            try:
                if not self._goes_on and hasattr(dataset, "set_epoch"):
                    dataset.set_epoch(self._epoch)
                self._goes_on = False
                for item in dataset:
                    number, self._seen = self._seen, self._seen + 1
                    if number % shares == index:
                        yield item
                if self._seen <= index:
                    raise DataError(
                        f"{type(self.dataset).__name__} gave {self._seen} samples in an epoch, and {shares} processes read it"
                        if shares > 1
                        else f"{type(self.dataset).__name__} gave no sample in an epoch"
                    )
            except DataError as error:
                yield Failure(error)
                return
            self._epoch, self._seen = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        own = self._open()[0]
        # As a text, so that nothing on its way between processes takes the state apart.
        state = json.dumps(to_json(own.state_dict(), f"state_dict of {type(self.dataset).__name__}"))
        position = {"epoch": self._epoch, "seen": self._seen, "dataset": state}
        # Those of the main process are stored with the rank's.
        return (
            position
            if get_worker_info() is None
            else {**position, "generators": json.dumps(to_json(_generators()))}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = self._open()[0]
        self._epoch, self._seen, self._goes_on = int(state["epoch"]), int(state["seen"]), True
        if hasattr(own, "set_epoch"):
            own.set_epoch(self._epoch)
        own.load_state_dict(from_json(json.loads(state["dataset"])))
        if "generators" in state and get_worker_info() is not None:
            _set_generators(from_json(json.loads(state["generators"])))


class _Collate:
    """Collation that lets failures through; an object, so that workers can be spawned."""

    def __init__(self, function: Callable[[list[Item]], Any]) -> None:
        self.function = function

    def __call__(self, items: list[Any]) -> Any:
        failed = next((item for item in items if isinstance(item, Failure)), None)
        if failed is not None:
            return failed
        try:
            return self.function(items)
        except DataError as error:
            return Failure(error)


def _generators() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys), *rest),
    }


def _set_generators(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
