"""Dealing the samples of an optimizer step to two experts, each of which learns its own part of the noise levels.

Which expert owns the k-th consumed sample follows from its timestep, which is keyed by k alone: every rank knows it of
the whole global batch without reading anything. The samples of a step are dealt high-noise expert first, then the
low-noise one, and inside an expert by bucket, in micro batches of MBS samples. As every rank must run the same expert at the
same time, what is left over is filled: such a slot repeats a sample of the same micro batch, with weight 0. An expert
that owns no sample of the global batch gets no micro batch.

A step has therefore not always as many micro batches, but as many on each rank; `Deal` tells where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from mm_core.data.collate import Batch
from mm_core.data.errors import DataError
from mm_core.data.order import GlobalOrder, Slot, check_sizes
from mm_core.data.streams import Failure

Owners = Callable[[Sequence[int]], Sequence[int]]
"""From consumed-sample indices to the position of the expert that owns each."""

_SLOT = "dealt_slot"


class Deal(NamedTuple):
    """The place of a micro batch in its optimizer step; the same on every rank.

    Attributes:
        expert: position of the expert that runs it.
        last_of_expert: no other of this expert follows in the step.
        last_of_step: the step ends with it.
    """

    expert: int
    last_of_expert: bool
    last_of_step: bool


class DealtSlot(NamedTuple):
    """One slot of a micro batch: a sample of the dataset, as the `key`-th that the run consumes; `weight` is 0 if it only
    fills the slot.
    """

    sample: int
    key: int
    weight: float
    deal: Deal


class ExpertSampler:
    """Yield without end, for one data-parallel rank, the slots of its micro batches, dealt by expert.

    Which samples a step has is that of `MicroBatchSampler`: the global order's next GBS.

    Args:
        order: the global order.
        owners: who owns which sample.
        bucket: of a dataset index; only samples of one bucket share a micro batch. None: all do.
        volume: of a dataset index, what a sample costs: the micro batches of an expert are then dealt largest first, so that
            what the ranks do at the same time is about the same work.
        others: those of `MicroBatchSampler`.

    Raises:
        DataError: the sizes do not fit.
    """

    def __init__(
        self,
        order: GlobalOrder,
        owners: Owners,
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        global_batch_size: int,
        consumed_samples: int = 0,
        bucket: Callable[[int], Hashable] | None = None,
        volume: Callable[[int], int] | None = None,
    ) -> None:
        check_sizes(micro_batch_size, global_batch_size, dp_size)
        self.order, self.owners = order, owners
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.consumed_samples = consumed_samples
        self.bucket, self.volume = bucket, volume

    def __iter__(self) -> Iterator[list[DealtSlot]]:
        first = self.consumed_samples
        while True:
            yield from self.step(first)
            first += self.global_batch_size

    def step(self, first: int) -> Iterator[list[DealtSlot]]:
        """This rank's micro batches of the step that begins with the `first`-th sample."""
        keys = range(first, first + self.global_batch_size)
        shares: dict[int, list[Slot]] = {}
        for key, owner in zip(keys, self.owners(keys), strict=True):
            shares.setdefault(owner, []).append((self.order[key], key))
        experts = sorted(shares)
        for expert in experts:
            rows = self._rows(shares[expert])
            for number, row in enumerate(rows):
                last = number == len(rows) - 1
                deal = Deal(expert, last, last and expert == experts[-1])
                yield [DealtSlot(*slot, weight, deal) for slot, weight in row[self.dp_rank]]

    def _rows(self, slots: list[Slot]) -> list[list[list[tuple[Slot, float]]]]:
        """Micro batches of one expert in rows of one for each rank; all of them full."""
        by_bucket: dict[Hashable, list[Slot]] = {}
        for slot in slots:
            key = None if self.bucket is None else self.bucket(slot[0])
            by_bucket.setdefault(key, []).append(slot)
        size = self.micro_batch_size
        micro = [same[at : at + size] for same in by_bucket.values() for at in range(0, len(same), size)]
        if self.volume is not None:
            volume = self.volume
            micro.sort(key=lambda part: -sum(volume(index) for index, _ in part))  # stable
        full = [[(slot, 1.0) for slot in part] + [(part[0], 0.0)] * (size - len(part)) for part in micro]
        # A rank for which none is left repeats the last one: the work of its row is then the same everywhere.
        full += [[(slot, 0.0) for slot, _ in full[-1]]] * (-len(full) % self.dp_size)
        return [full[at : at + self.dp_size] for at in range(0, len(full), self.dp_size)]


class DealtSlots(Dataset[Any]):
    """A dataset that is indexed by `DealtSlot`.

    Args:
        slots: the same indexed by `Slot`; its items are dicts or failures.
    """

    def __init__(self, slots: Any) -> None:
        self.slots = slots

    def __getitem__(self, slot: DealtSlot) -> dict[str, Any] | Failure:
        item = self.slots[slot.sample, slot.key]
        return item if isinstance(item, Failure) else {**item, _SLOT: slot}


class DealtCollate:
    """Adds to a batch `sample_weight`, fp32 `[B]`, and its `Deal` as `deal`; an object, so that workers can be spawned.

    Args:
        collate: of the items without what was dealt.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Batch | Failure]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> Batch | Failure:
        slots = [item[_SLOT] for item in items if not isinstance(item, Failure)]
        rest = [
            item if isinstance(item, Failure) else {k: v for k, v in item.items() if k != _SLOT}
            for item in items
        ]
        batch = self.collate(rest)
        if isinstance(batch, Failure):
            return batch
        return {**batch, "sample_weight": torch.tensor([s.weight for s in slots]), "deal": slots[0].deal}


def refuse_stream(dataset: Any) -> None:
    """Samples of a stream cannot be dealt by expert.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"{type(dataset).__name__} is a stream: which expert owns a sample is not known before it is read, and two experts "
        "need a dataset that can be indexed; train one expert at a time (boundary with expert, no low_noise_predictor)"
    )
