"""What happens beside the loss: a callback sees the run start, each step, and the end, and changes no number."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RunContext:
    """What a callback may know of the run.

    Attributes:
        rank, world_size: of this process; rank 0 writes.
        first_step: the step before the first one of this process (0, or the checkpoint's).
        last_step: `--train-iters`.
        log_interval: `--log-interval`, in steps.
        folder: the run's folder, `None` without `--save`.
        model: the composite model, sharded.
    """

    rank: int
    world_size: int
    first_step: int
    last_step: int
    log_interval: int
    folder: Path | None
    model: torch.nn.Module

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as `metrics.jsonl` has it.

    Attributes:
        step: counted from 1.
        loss: mean over the global batch, weighted as the task says.
        grad_norm: global 2-norm before clipping.
        lr: learning rate of this update.
        seconds: wall-clock time of the step, data loading included.
        samples_per_second, tokens_per_second: of the whole job.
        memory_bytes: peak of the accelerator's allocator on rank 0, or the peak resident set on a CPU.
        consumed_samples: after this step.
        extra: the task's own metrics.

    Raises:
        ValueError: the task names a metric as one of the above.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    samples_per_second: float
    tokens_per_second: float
    memory_bytes: int
    consumed_samples: int
    extra: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = sorted(self.extra.keys() & self.__dataclass_fields__.keys())
        if taken:
            raise ValueError(
                f"the task's metrics {taken} have the names of the loop's own numbers; rename them"
            )

    def flat(self) -> dict[str, float | int]:
        """All numbers in one level."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        return {**values, **self.extra}


class Callback(Protocol):
    """An observer of a run; each method is called on every rank."""

    def on_train_start(self, context: RunContext) -> None:
        """Everything is built and loaded; no step was taken."""

    def on_step_start(self, context: RunContext, step: int) -> None:
        """Before the micro batches of optimizer step `step` are read."""

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        """After the update."""

    def on_train_end(self, context: RunContext) -> None:
        """After the last step, also when the run ends by an error."""


class BaseCallback:
    """A callback that does nothing; inherit to write only the methods you need."""

    def on_train_start(self, context: RunContext) -> None:
        pass

    def on_step_start(self, context: RunContext, step: int) -> None:
        pass

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        pass

    def on_train_end(self, context: RunContext) -> None:
        pass
