"""Which noise levels a training run covers, as its files tell before anything is built.

A diffusion's config class may have, torch-free, `trained_sigmas()`: the range that the run draws its noise levels
from, as `TrainedSigmas`, or None if the section does not tell. Files that state a boundary between two experts in
different ways (an index of one grid, a sigma) can then be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm_core.config.component import ComponentConfig
from mm_registry.errors import UserError


@dataclass(frozen=True, slots=True)
class TrainedSigmas:
    """A range of noise levels; 1.0 is pure noise, 0.0 is none.

    Attributes:
        high: where the range begins; 1.0 if that is where the grid begins.
        low: where it ends; 0.0 if that is where the grid ends.
        high_key, low_key: keys of the section that say so.
        boundary: sigma within the range at and above which the high-noise expert works, where both are trained in one
            job; None where one is.
    """

    high: float
    low: float
    high_key: str
    low_key: str
    boundary: float | None = None

    @property
    def edge(self) -> tuple[float, str] | None:
        """The sigma at which the other expert takes over and its key; None for a run of one expert that covers all noise
        levels or a part in the middle.
        """
        if self.boundary is not None:
            return self.boundary, self.low_key
        if self.high >= 1.0 and self.low > 0.0:
            return self.low, self.low_key
        if self.high < 1.0 and self.low <= 0.0:
            return self.high, self.high_key
        return None

    @property
    def expert(self) -> str:
        """`high-noise` or `low-noise`, for a range with an edge."""
        return "high-noise" if self.high >= 1.0 else "low-noise"


def trained_sigmas(diffusion: ComponentConfig) -> TrainedSigmas | None:
    """Return the range that a diffusion's config class tells, None if it has no `trained_sigmas`.

    Raises:
        UserError: the method of a plugin's class raised, or returned something else; its distribution is named.
    """
    ask = getattr(diffusion.config, "trained_sigmas", None)
    if not callable(ask):
        return None
    label = f"{diffusion.label}: trained_sigmas of {diffusion.spec.provider}'s config class"
    try:
        told = ask()
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{label} raised {text}") from error
    if told is not None and not isinstance(told, TrainedSigmas):
        raise UserError(f"{label} returned a {type(told).__name__}; it must return a TrainedSigmas or None")
    return told


def shifted_sigma(
    index: int,
    *,
    steps: int,
    shift: float,
    sigma_max: float = 1.0,
    sigma_min: float = 0.0,
    extra_one_step: bool = False,
) -> float:
    """Return the sigma at `index` of a descending flow-matching grid of `steps` points.

    The grid is `linspace(sigma_max, sigma_min)` of `steps` points, of one more without the last with
    `extra_one_step`; each s becomes `shift * s / (1 + (shift - 1) * s)`.
    """
    last = steps if extra_one_step else max(1, steps - 1)
    sigma = sigma_max + (sigma_min - sigma_max) * index / last
    return shift * sigma / (1 + (shift - 1) * sigma)
