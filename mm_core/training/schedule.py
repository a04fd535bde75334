"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then a decay from `peak` to `minimum`; the semantics of Megatron-LM's flags.

    As there, an update takes the rate of the steps that were done before it: without warm-up the first one is made at `peak`,
    with warm-up at `warmup_init`, and `minimum` is reached by the first update after `decay_steps`.

    Attributes:
        peak: `--lr`.
        minimum: `--min-lr`.
        style: `--lr-decay-style`.
        warmup_steps: optimizer steps of warm-up, counted inside `decay_steps`.
        warmup_init: `--lr-warmup-init`, the rate from which the warm-up starts.
        decay_steps: `--lr-decay-iters`, by default `--train-iters`.
    """

    peak: float
    minimum: float = 0.0
    style: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    warmup_init: float = 0.0
    decay_steps: int = 1

    def __call__(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 1 (the first update)."""
        done = step - 1
        if self.warmup_steps and done <= self.warmup_steps:
            return self.warmup_init + (self.peak - self.warmup_init) * done / self.warmup_steps
        if self.style == "constant":
            return self.peak
        if done >= self.decay_steps:
            return self.minimum
        progress = (done - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
        factor = 1.0 - progress if self.style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.minimum + (self.peak - self.minimum) * factor
