"""Results and settings of a process compared; checks reach it through `mm_core.testing.builds`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mm_core.testing.check import CheckFailed


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude of `b`; infinite if shapes differ or one is not
    finite.
    """
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    largest = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-12)
    return largest if largest == largest else float("inf")


def must_be_close(a: torch.Tensor, b: torch.Tensor, tolerance: float, what: str) -> None:
    """Raise CheckFailed with `what` unless the relative distance is within the tolerance."""
    found = distance(a, b)
    if found > tolerance:
        raise CheckFailed(f"{what} (they differ by {found:.2g} of the largest value)")


def must_differ(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """Raise CheckFailed with `what` if two results are the same."""
    if distance(a, b) < 1e-6:
        raise CheckFailed(what)


def global_state() -> dict[str, Any]:
    """What code can change behind everyone's back: the process' generators and torch's switches."""
    import random

    import numpy as np

    return {
        "torch's global generator": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy's global generator": repr(np.random.get_state(legacy=False)),
        "Python's global generator": hash(random.getstate()),
        **global_switches(),
    }


def global_switches() -> dict[str, Any]:
    """Torch's process-wide settings."""
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
    }


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of what is not as before."""
    return [name for name in before if before[name] != after[name]]
