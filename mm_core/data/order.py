"""The one global order in which samples are consumed, and each rank's share of it.

Optimizer step s, accumulation a, data-parallel rank r, slot b consume the global sample
`s·GBS + a·dp·MBS + r·MBS + b`, and the global sample k is `permutation(epoch k // N)[k % N]` of a set of N.
The order is therefore the same for any number of ranks, any micro batch, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from mm_core.data.errors import DataError
from mm_core.random import keyed_generator

Slot = tuple[int, int]
"""(index into the dataset, consumed-sample index)."""


class GlobalOrder:
    """Which sample of a set of `size` is the k-th to be consumed.

    Args:
        size: samples in the set.
        seed: the run's seed.
        shuffle: a new permutation every epoch; otherwise the set's own order.
    """

    def __init__(self, size: int, seed: int, *, shuffle: bool = True) -> None:
        if size < 1:
            raise DataError("the dataset has no sample")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        # Prefetching loaders straddle two epochs at most.
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def __getitem__(self, consumed: int) -> int:
        """Return the dataset index of the `consumed`-th sample of the run."""
        if consumed < 0:
            raise IndexError(f"consumed-sample indices start at 0, not at {consumed}")
        epoch, position = divmod(consumed, self.size)
        return int(self._permutation(epoch)[position]) if self.shuffle else position

    def _draw_permutation(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.size, generator=keyed_generator(self.seed, "order", epoch))


class MicroBatchSampler:
    """Yield without end, for one data-parallel rank, the slots of its micro batches.

    Args:
        order: the global order.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        micro_batch_size: samples of one micro batch of one rank (MBS).
        global_batch_size: samples of one optimizer step over all ranks (GBS), a multiple of MBS · dp_size.
        consumed_samples: samples that the run consumed before, over all ranks.

    Raises:
        DataError: the sizes do not fit.
    """

    def __init__(
        self,
        order: GlobalOrder,
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        global_batch_size: int,
        consumed_samples: int = 0,
    ) -> None:
        check_sizes(micro_batch_size, global_batch_size, dp_size)
        if not 0 <= dp_rank < dp_size:
            raise DataError(f"data-parallel rank {dp_rank} is not among {dp_size}")
        if consumed_samples < 0:
            raise DataError(f"consumed_samples is {consumed_samples}, but cannot be negative")
        self.order = order
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[list[Slot]]:
        # Steps follow each other without a gap, and so do the accumulations of a step: one stride does both.
        first = self.consumed_samples + self.dp_rank * self.micro_batch_size
        while True:
            yield [(self.order[k], k) for k in range(first, first + self.micro_batch_size)]
            first += self.micro_batch_size * self.dp_size


def check_sizes(micro_batch_size: int, global_batch_size: int, dp_size: int) -> None:
    """Check that a global batch can be dealt.

    Raises:
        DataError: it cannot.
    """
    if micro_batch_size < 1 or global_batch_size < 1 or dp_size < 1:
        raise DataError(
            f"micro batch {micro_batch_size}, global batch {global_batch_size} and {dp_size} "
            "data-parallel ranks must all be at least 1"
        )
    together = micro_batch_size * dp_size
    if global_batch_size % together:
        raise DataError(
            f"global batch size {global_batch_size} is not a multiple of {together} = micro batch size "
            f"{micro_batch_size} × {dp_size} data-parallel rank{'s' if dp_size > 1 else ''}; "
            f"choose a multiple of {together}"
        )
