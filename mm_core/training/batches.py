"""The micro batches that a rank trains on: one optimizer step after the other, and once more those of a step that was."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mm_core.config import TrainingJob
from mm_core.data import build_loader
from mm_core.data.loader import MicroBatches
from mm_core.data.streams import StreamedBatches, is_streamed
from mm_core.sharding.mesh import ParallelMesh

if TYPE_CHECKING:
    from mm_core.data.collate import Batch
    from mm_core.data.dealing import Owners
    from mm_core.training.step import StepReport


class TrainingBatches:
    """The data of a run, from a sample on.

    Args:
        dataset: of the job.
        mesh: of the model.
        accumulation: micro batches of a step.
        consumed_samples: by the run so far.
        position: of this rank's stream, from a checkpoint.
        owners: which of two experts owns which sample; a step's number of micro batches then varies.
    """

    def __init__(
        self,
        job: TrainingJob,
        dataset: Any,
        mesh: ParallelMesh,
        *,
        accumulation: int,
        consumed_samples: int,
        position: Any = None,
        owners: Owners | None = None,
    ) -> None:
        self.job, self.dataset, self.mesh = job, dataset, mesh
        self.accumulation = accumulation
        self._position, self._owners = position, owners
        self.dealt = owners is not None
        self.loader = self._build(job.flags.num_workers, consumed_samples)
        self._batches = iter(self.loader)
        self._ahead: deque[Batch] = deque()  # read, and not yet asked for
        # A stream cannot be read again: what this rank was given is kept for two steps, since a bad one may be noticed late.
        self._kept: deque[Batch] | None = deque(maxlen=2 * accumulation) if is_streamed(dataset) else None

    def _build(self, num_workers: int, consumed_samples: int) -> MicroBatches | StreamedBatches:
        flags = self.job.flags
        return build_loader(
            self.dataset,
            self.job.data,
            seed=flags.seed,
            dp_rank=self.mesh.dp_rank,
            dp_size=self.mesh.dp_size,
            micro_batch_size=flags.micro_batch_size,
            global_batch_size=flags.global_batch_size,
            num_workers=num_workers,
            consumed_samples=consumed_samples,
            position=self._position,
            owners=self._owners,
        )

    def step(self, indices: list[int]) -> StepBatches:
        """The micro batches of the next optimizer step, read when they are asked for.

        Args:
            indices: the consumed-sample indices are added to it.
        """
        return StepBatches(self, indices)

    def next(self) -> Batch:
        """The next micro batch of the run."""
        batch = self._ahead.popleft() if self._ahead else next(self._batches)
        if self._kept is not None:
            self._kept.append(batch)
        return batch

    def peek(self, count: int) -> list[Batch]:
        """Up to `count` micro batches that come next, also those of later steps; none of a stream, whose position in a
        checkpoint is that of what was read.
        """
        if self._kept is not None:
            return []
        while len(self._ahead) < count:
            self._ahead.append(next(self._batches))
        return list(itertools.islice(self._ahead, count))

    def again(self, report: StepReport) -> Iterator[Batch]:
        """The micro batches of a step that was, in this process.

        Args:
            report: of the last step or the one before it.
        """
        wanted = set(report.samples)
        if self._kept is not None:
            yield from (batch for batch in self._kept if wanted.issuperset(batch["sample_index"].tolist()))
            return
        left = len(report.samples)
        for batch in self._build(0, report.consumed_samples - self.job.flags.global_batch_size):
            if left <= 0:
                return
            left -= len(batch["sample_index"])
            yield batch


class StepBatches(Iterator["Batch"]):
    """The micro batches of one optimizer step; made by `TrainingBatches.step`."""

    def __init__(self, batches: TrainingBatches, indices: list[int]) -> None:
        self._batches, self._indices = batches, indices
        # Dealt ones say where the step ends.
        self._left: int | None = None if batches.dealt else batches.accumulation
        self._ended = False

    def __next__(self) -> Batch:
        if self._ended or self._left == 0:
            raise StopIteration
        batch = self._batches.next()
        if self._left is None:
            self._ended = batch["deal"].last_of_step
        else:
            self._left -= 1
        self._indices += batch["sample_index"].tolist()
        return batch

    def peek(self, count: int) -> list[Batch]:
        """Up to `count` micro batches after the last one, those of later steps too."""
        return self._batches.peek(count)
