"""From a dataset to micro batches: workers, collation, and the endless global order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from mm_core.data.buckets import BySize, build_order, by_size, check_position
from mm_core.data.collate import Batch, Item, collate
from mm_core.data.dealing import DealtCollate, DealtSlots, ExpertSampler, Owners, refuse_stream
from mm_core.data.errors import DataError
from mm_core.data.order import MicroBatchSampler, Slot, check_sizes
from mm_core.data.streams import Failure, StreamedBatches, is_streamed
from mm_core.random import keyed_generator, keyed_global_generators

if TYPE_CHECKING:
    from mm_core.config.data import DataConfig

Collate = Callable[[Sequence[Item]], Batch]


@runtime_checkable
class KeyedDataset(Protocol):
    """A map-style dataset whose own randomness is keyed by the consumed-sample index.

    It may also have `bucket(index) -> ClipShape | None` (`mm_core.data.buckets`), the same for any key: samples of
    one bucket can be stacked to a micro batch. None, or no such method: all samples are alike.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def get(self, index: int, key: int) -> Item:
        """Return sample `index` as the `key`-th sample that the run consumes."""


class MicroBatches:
    """The endless stream of micro batches of one data-parallel rank; iterate it once.

    Each batch is a dict: tensors of the items stacked to `[B, …]`, everything else a list, and `sample_index`
        int64 `[B]`, the
    consumed-sample index that keys all randomness.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def state_dict(self) -> Any:
        """`None`: the number of consumed samples says it all."""
        return None

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, Failure):
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
    position: Any = None,
    owners: Owners | None = None,
) -> MicroBatches | StreamedBatches:
    """Return the micro batches of one data-parallel rank, from the run's `consumed_samples`-th sample on,
    without end.

    Of a map-style dataset, the samples are the same for any `dp_size`, `micro_batch_size` and `num_workers`; see
    `mm_core.data.order`, and `mm_core.data.buckets` for samples that are grouped, whose order `micro_batch_size` decides
    too. An iterable one goes on for as many of each as before only; see `mm_core.data.streams`.

    Args:
        dataset: its items are dicts; with `collate_fn` it stacks its own batches. Map-style: with `get(index, key)`
            its randomness follows the consumed-sample index; without, the global generators that it draws from do.
        data: `dataloader_param` says about shuffling, prefetching and pinned memory.
        num_workers: processes that decode; 0 decodes in this one.
        position: of an iterable dataset: what `state_dict()` of this rank's loader returned.
        owners: which expert owns which sample; the samples of a step are then dealt by expert, see `mm_core.data.dealing`.

    Raises:
        DataError: the batch sizes do not fit, or the dataset can neither be indexed nor continued.
    """
    options, settings = data.dataloader_param, loader_settings(data, num_workers)
    collate_fn: Collate = getattr(dataset, "collate_fn", None) or collate
    if is_streamed(dataset):
        if owners is not None:
            refuse_stream(dataset)
        check_sizes(micro_batch_size, global_batch_size, dp_size)
        return StreamedBatches(
            dataset, seed=seed, dp_rank=dp_rank, dp_size=dp_size, collate_fn=collate_fn,
            consumed_samples=consumed_samples, position=position, batch_size=micro_batch_size, **settings,
        )  # fmt: skip
    if not hasattr(dataset, "__len__") or not (
        isinstance(dataset, KeyedDataset) or hasattr(dataset, "__getitem__")
    ):
        raise DataError(
            f"{type(dataset).__name__} has no length or cannot be indexed; "
            "a dataset must have __len__, and __getitem__ or get, or be iterable"
        )
    check_sizes(micro_batch_size, global_batch_size, dp_size)
    # Experts are dealt micro batches of one shape by themselves, out of the order of single samples.
    filled = micro_batch_size if owners is None else 1
    order = build_order(dataset, options, seed, filled, stacked=collate_fn is collate)
    check_position(order, consumed_samples)
    sizes = {
        "dp_rank": dp_rank,
        "dp_size": dp_size,
        "micro_batch_size": micro_batch_size,
        "global_batch_size": global_batch_size,
        "consumed_samples": consumed_samples,
    }
    volume = by_size(dataset, options)
    slots: Dataset[Any] = Slots(dataset, seed)
    stacked: Any = SlotCollate(collate_fn)
    if owners is not None:
        bucket = getattr(dataset, "bucket", None)
        sampler: Any = ExpertSampler(order, owners, bucket=bucket, volume=volume, **sizes)
        slots, stacked = DealtSlots(slots), DealtCollate(stacked)
    else:
        sampler = MicroBatchSampler(order, **sizes) if volume is None else BySize(order, volume, **sizes)
    loader: DataLoader[Any] = DataLoader(
        slots,
        batch_sampler=sampler,
        collate_fn=stacked,
        # Its own seed: torch's would be drawn from the generator of module dropout, at each start of the run.
        generator=keyed_generator(seed, "workers", dp_rank),
        **settings,
    )
    return MicroBatches(loader)


def loader_settings(data: DataConfig, num_workers: int) -> dict[str, Any]:
    """What torch's loader is told beside what it reads: workers, prefetching, pinned memory."""
    options = data.dataloader_param
    return {
        "num_workers": num_workers,
        "pin_memory": bool(options.pin_memory) and torch.accelerator.is_available(),
        "prefetch_factor": (options.prefetch_factor or 2) if num_workers else None,
        "worker_init_fn": start_worker if num_workers else None,
    }


class Slots(Dataset[Any]):
    """A dataset indexed by (dataset index, consumed-sample index)."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.keyed = isinstance(dataset, KeyedDataset)

    def __getitem__(self, slot: Slot) -> Item | Failure:
        index, key = slot
        try:
            if self.keyed:
                item = self.dataset.get(index, key)
            else:  # whatever it draws, it draws the same on any rank, in any worker, and after a resume
                with keyed_global_generators(self.seed, "sample", key):
                    item = self.dataset[index]
        except DataError as error:
            return Failure(error)
        return {**item, "sample_index": key}


class SlotCollate:
    """Collation that lets failures through; an object, not a closure, so that workers can be spawned."""

    def __init__(self, function: Collate) -> None:
        self.function = function

    def __call__(self, items: Sequence[Item | Failure]) -> Batch | Failure:
        good = [item for item in items if not isinstance(item, Failure)]
        if len(good) < len(items):
            return next(item for item in items if isinstance(item, Failure))
        try:
            indices = torch.tensor([item["sample_index"] for item in good], dtype=torch.int64)
            batch = self.function([{k: v for k, v in item.items() if k != "sample_index"} for item in good])
        except DataError as error:
            return Failure(error)
        return {**batch, "sample_index": indices}


def start_worker(worker: int) -> None:
    """What each worker does first."""
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
