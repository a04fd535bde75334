"""Looking at a model while it trains: the loss of a validation set, and sample videos, which leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from mm_core.training.ema import ExponentialAverage
from mm_core.training.samples import SampleVideos
from mm_core.training.validation import Validation

_AVERAGED = "ema"


class Looks:
    """What is done between two steps of a run. All ranks call the methods.

    Args:
        validation, samples: None where the job has none.
        ema: the averages with which both are done as well; None: with the weights alone.
    """

    def __init__(
        self,
        validation: Validation | None,
        samples: SampleVideos | None,
        ema: ExponentialAverage | None = None,
    ) -> None:
        self.validation, self.samples, self.ema = validation, samples, ema

    def due(self, step: int) -> bool:
        """Whether there is something after this step."""
        return self._validates(step) or self._samples(step)

    def before_training(self, stop_requested: Callable[[], bool]) -> None:
        """Sample videos of a model that has taken no step: a mistake in their file shows before hours of training, not after
        them.
        """
        if self.samples is not None:
            self.samples.run(0, stop_requested)

    def run(self, step: int, stop_requested: Callable[[], bool]) -> dict[str, float]:
        """Validate and make videos, whatever of it is due.

        Returns:
            What `Validation.run` says; of the averages with `val_ema_` in the place of `val_`.
        """
        numbers: dict[str, float] = {}
        for name, weights in self._weights():
            with weights:
                if self._validates(step) and self.validation is not None:
                    found = self.validation.run(step, stop_requested)
                    numbers |= {_named(key, name): value for key, value in found.items()}
                if self._samples(step) and self.samples is not None:
                    self.samples.run(step, stop_requested, f"-{name}" if name else "")
        return numbers

    def _weights(self) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        yield "", nullcontext()
        if self.ema is not None:
            yield _AVERAGED, self.ema.swapped()

    def _validates(self, step: int) -> bool:
        return self.validation is not None and self.validation.due(step)

    def _samples(self, step: int) -> bool:
        return self.samples is not None and self.samples.due(step)


def _named(key: str, weights: str) -> str:
    return key.replace("val_", f"val_{weights}_", 1) if weights else key
