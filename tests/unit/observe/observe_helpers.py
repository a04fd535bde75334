"""A run's context and step records, made up."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mm_core.observe.callback import RunContext, StepRecord


def context(
    rank: int = 0, *, first: int = 0, last: int = 10, interval: int = 1, folder: Path | None = None
) -> RunContext:
    return RunContext(rank, 2, first, last, interval, folder, nn.Identity())


def record(
    step: int, *, loss: float = 0.5, seconds: float = 0.25, extra: dict[str, float] | None = None
) -> StepRecord:
    return StepRecord(
        step=step, loss=loss, grad_norm=1.25, lr=1e-3, seconds=seconds, samples_per_second=4 / seconds,
        tokens_per_second=4000.0, memory_bytes=3 * 2**30, consumed_samples=4 * step, extra=extra or {},
    )  # fmt: skip
