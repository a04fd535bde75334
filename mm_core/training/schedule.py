"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

#: What is left of the way from `minimum` to `peak`, by the share of the decay that is done.
_DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "exponential": lambda done: 2.0 * 0.5**done - 1.0,
    "minus_sqrt": lambda done: 1.0 - math.sqrt(done),
}


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then a decay from `peak` to `minimum`; the semantics of Megatron-LM's flags.

    As there, an update takes the rate of the steps that were done before it: without warm-up the first one is made at `peak`,
    with warm-up at `warmup_init`, and `minimum` is reached by the first update after `decay_steps`.

    Of n steps done, `inverse-square-root` makes `peak · √(warmup_steps / n)` (Vaswani et al., arXiv:1706.03762), but not less
    than `minimum`; without a warm-up as after one step of it (Megatron-LM: after one sample). `WSD` (warm-up, stable, decay:
    Hu et al., arXiv:2404.06395) stays at `peak` until the last `wsd_decay_steps` of the decay.

    Attributes:
        peak: `--lr`.
        minimum: `--min-lr`.
        style: `--lr-decay-style`.
        warmup_steps: optimizer steps of warm-up, counted inside `decay_steps`.
        warmup_init: `--lr-warmup-init`, the rate from which the warm-up starts.
        decay_steps: `--lr-decay-iters`, by default `--train-iters`.
        wsd_style: `--lr-wsd-decay-style`, the shape of the decay of `WSD`.
        wsd_decay_steps: `--lr-wsd-decay-iters`, which only `WSD` reads.
    """

    peak: float
    minimum: float = 0.0
    style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "constant"
    warmup_steps: int = 0
    warmup_init: float = 0.0
    decay_steps: int = 1
    wsd_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    wsd_decay_steps: int = 1

    def __call__(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 1 (the first update)."""
        done = step - 1
        if self.warmup_steps and done <= self.warmup_steps:
            return self.warmup_init + (self.peak - self.warmup_init) * done / self.warmup_steps
        if self.style == "constant":
            return self.peak
        if done > self.decay_steps:
            return self.minimum
        if self.style == "inverse-square-root":
            return max(self.minimum, self.peak * math.sqrt(max(self.warmup_steps, 1) / max(done, 1)))
        if done == self.decay_steps:  # also where the warm-up fills the whole decay
            return self.minimum
        style: str = self.style
        start, steps = self.warmup_steps, self.decay_steps - self.warmup_steps
        if style == "WSD":
            style, start, steps = (
                self.wsd_style,
                self.decay_steps - self.wsd_decay_steps,
                self.wsd_decay_steps,
            )
        left = _DECAYS[style](max(0.0, (done - start) / steps))
        return self.minimum + (self.peak - self.minimum) * left
