"""Micro batches that are prepared ahead are those of a run without it, in order, and nothing is in the making at rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mm_core.accelerator import Accelerator
from mm_core.training.ahead import StepInputs

pytestmark = pytest.mark.timeout(60)
ACCUMULATION = 2


class Source:
    """Steps of two micro batches, and what was made when and where."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.count, self.fail_at = 0, fail_at
        self.threads: set[int] = set()
        self.recorded: list[bool] = []

    def begin(self, indices: list[int]) -> Iterator[dict[str, Any]]:
        for _ in range(ACCUMULATION):
            if self.count == self.fail_at:
                raise OSError("clip 5 is damaged")
            self.threads.add(threading.get_ident())
            self.recorded.append(torch.is_grad_enabled())
            indices.append(self.count)
            self.count += 1
            yield {"number": self.count - 1}


def run(source: Source, steps: int, *, ahead: bool, streamed: bool = False) -> list[tuple[list[int], int]]:
    """Indices of each step's samples, and how many micro batches had been made at its end."""
    found = []
    with StepInputs(source.begin, Accelerator("cpu"), encode_ahead=ahead, streamed=streamed) as inputs:
        for step in range(steps):
            indices: list[int] = []
            numbers = [item["number"] for item in inputs.step(indices, more=step + 1 < steps)]
            inputs.rest()
            assert numbers == indices
            found.append((indices, source.count))
    return found


def test_the_next_step_begins_in_a_thread_and_no_further() -> None:
    source, plain = Source(), Source()
    ahead, wanted = run(source, 3, ahead=True), run(plain, 3, ahead=False)
    assert [indices for indices, _ in ahead] == [indices for indices, _ in wanted] == [[0, 1], [2, 3], [4, 5]]
    assert [made for _, made in wanted] == [2, 4, 6]
    assert [made for _, made in ahead] == [3, 5, 6]  # none after the last step
    assert len(source.threads) == 1
    assert threading.get_ident() not in source.threads
    assert not any(source.recorded)


def test_of_a_stream_nothing_is_read_before_its_step() -> None:
    assert [made for _, made in run(Source(), 3, ahead=True, streamed=True)] == [2, 4, 6]


def test_an_error_is_raised_in_its_own_step() -> None:
    source = Source(fail_at=2)
    with StepInputs(source.begin, Accelerator("cpu"), encode_ahead=True) as inputs:
        assert len(list(inputs.step([], more=True))) == ACCUMULATION
        inputs.rest()
        with pytest.raises(OSError, match="clip 5"):
            next(inputs.step([], more=True))


def test_a_step_that_is_left_early_does_not_keep_the_thread() -> None:
    inputs = StepInputs(Source().begin, Accelerator("cpu"), encode_ahead=True)
    with inputs:
        next(inputs.step([], more=True))
    assert not any(t.name.startswith("encode-ahead") for t in threading.enumerate())
