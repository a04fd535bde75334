"""From a dataset to micro batches: workers, collation, and the endless global order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from mm_core.data.collate import Batch, Item, collate
from mm_core.data.errors import DataError
from mm_core.data.order import GlobalOrder, MicroBatchSampler, Slot

if TYPE_CHECKING:
    from mm_core.config.data import DataConfig

Collate = Callable[[Sequence[Item]], Batch]


@runtime_checkable
class KeyedDataset(Protocol):
    """A map-style dataset whose own randomness is keyed by the consumed-sample index."""

    def __len__(self) -> int:
        """Number of samples."""

    def get(self, index: int, key: int) -> Item:
        """Return sample `index` as the `key`-th sample that the run consumes."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """A `DataError` on its way out of a worker: torch would put the worker's traceback into its message."""

    error: DataError


class MicroBatches:
    """The endless stream of micro batches of one data-parallel rank; iterate it once.

    Each batch is a dict: tensors of the items stacked to `[B, …]`, everything else a list, and `sample_index`
        int64 `[B]`, the
    consumed-sample index that keys all randomness.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch


def build_loader(
    dataset: Any,
    data: DataConfig,
    *,
    seed: int,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    num_workers: int = 0,
    consumed_samples: int = 0,
) -> MicroBatches:
    """Return the micro batches of one data-parallel rank, from the run's `consumed_samples`-th sample on,
    without end.

    The samples are the same for any `dp_size`, `micro_batch_size` and `num_workers`; see
    `mm_core.data.order`.

    Args:
        dataset: map-style; its items are dicts. With `get(index, key)` its randomness follows the
            consumed-sample index; with `collate_fn` it stacks its own batches.
        data: `dataloader_param` says about shuffling, prefetching and pinned memory.
        num_workers: processes that decode; 0 decodes in this one.

    Raises:
        DataError: the batch sizes do not fit, or the dataset cannot be indexed.
    """
    if not hasattr(dataset, "__len__") or not (
        isinstance(dataset, KeyedDataset) or hasattr(dataset, "__getitem__")
    ):
        raise DataError(
            f"{type(dataset).__name__} has no length or cannot be indexed; "
            "a dataset must have __len__, and __getitem__ or get"
        )
    options = data.dataloader_param
    shuffle = options.shuffle and options.sampler_type != "SequentialSampler"
    sampler = MicroBatchSampler(
        GlobalOrder(len(dataset), seed, shuffle=shuffle),
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        consumed_samples=consumed_samples,
    )
    loader: DataLoader[Any] = DataLoader(
        _Slots(dataset),
        batch_sampler=sampler,
        collate_fn=_Collate(getattr(dataset, "collate_fn", None) or collate),
        num_workers=num_workers,
        pin_memory=bool(options.pin_memory) and torch.accelerator.is_available(),
        prefetch_factor=(options.prefetch_factor or 2) if num_workers else None,
        worker_init_fn=_start_worker if num_workers else None,
    )
    return MicroBatches(loader)


class _Slots(Dataset[Any]):
    """A dataset indexed by (dataset index, consumed-sample index)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.keyed = isinstance(dataset, KeyedDataset)

    def __getitem__(self, slot: Slot) -> Item | _Failure:
        index, key = slot
        try:
            item = self.dataset.get(index, key) if self.keyed else self.dataset[index]
        except DataError as error:
            return _Failure(error)
        return {**item, "sample_index": key}


class _Collate:
    """Collation that lets failures through; an object, not a closure, so that workers can be spawned."""

    def __init__(self, function: Collate) -> None:
        self.function = function

    def __call__(self, items: Sequence[Item | _Failure]) -> Batch | _Failure:
        good = [item for item in items if not isinstance(item, _Failure)]
        if len(good) < len(items):
            return next(item for item in items if isinstance(item, _Failure))
        try:
            indices = torch.tensor([item["sample_index"] for item in good], dtype=torch.int64)
            batch = self.function([{k: v for k, v in item.items() if k != "sample_index"} for item in good])
        except DataError as error:
            return _Failure(error)
        return {**batch, "sample_index": indices}


def _start_worker(worker: int) -> None:
    # The tokenizers library warns about every fork otherwise; one caption at a time needs no threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _obey_only_the_owner()


def _obey_only_the_owner() -> None:
    """End this worker by SIGTERM when its owner sends it, and by nobody else's.

    A scheduler sends SIGTERM to every process of a job, and the trainer needs its workers until it has saved;
    torch and Python end workers by the same signal, also those that hang in a read that never returns. Only
    sigwaitinfo tells the sender, so a thread waits in it: it also runs while the worker's own code is stuck.
    """
    owner = multiprocessing.parent_process()
    starter = os.getppid()  # the owner, or the server that forked this worker for it
    if owner is None or not hasattr(signal, "sigwaitinfo"):  # macOS: every SIGTERM ends the worker
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while True:
            sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
            if sender == owner.pid or os.getppid() != starter:  # an orphan serves nobody
                os._exit(0)  # torch takes any other code for a crash, and raises in the owner

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
