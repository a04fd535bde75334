"""Preparing micro batches beside the computation (`--encode-ahead`): while one is trained on, a thread encodes the next.

What a task prepares is keyed by sample, so the losses are those of a run without it. It costs the memory of one more prepared
micro batch and of the encoders' activations beside those of the trained model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import torch

from mm_core.accelerator import Accelerator

log = logging.getLogger(__name__)

Begin = Callable[[list[int]], Iterator[Any]]
"""From a list, which the samples' indices are added to, to the prepared micro batches of the next optimizer step."""
_END = object()


@dataclasses.dataclass
class _Step:
    """One optimizer step's micro batches, begun when the first of them is asked for."""

    begin: Begin
    indices: list[int] = dataclasses.field(default_factory=list)
    items: Iterator[Any] | None = None

    def next(self) -> Any:
        if self.items is None:
            self.items = self.begin(self.indices)
        return next(self.items, _END)


@dataclasses.dataclass(frozen=True)
class _Made:
    """What the thread made: an item, or `_END`; the indices that were read by then; when the device has it."""

    item: Any
    indices: tuple[int, ...]
    done: Any


class Ahead:
    """The prepared micro batches of each optimizer step, the next one always in the making.

    One thread asks for them, in order, so a task sees them as without it. On an accelerator it computes on a stream of its own,
    which waits for what the device was given before, and for which the training waits when it takes an item. Nothing is made
    between `rest()` and the next step: validation, generation and checkpoints find the encoders idle.

    Args:
        begin: of a step.
        accelerator: of this rank.
        across_steps: also make the first micro batch of the next step. Off for data whose position in a checkpoint is that
            of what was read.
    """

    def __init__(self, begin: Begin, accelerator: Accelerator, *, across_steps: bool = True) -> None:
        self._begin, self._accelerator, self._across_steps = begin, accelerator, across_steps
        self._stream = accelerator.new_stream()
        self._thread = ThreadPoolExecutor(1, "encode-ahead", initializer=accelerator.use)
        self._asked: Future[_Made] | None = None
        self._upcoming: tuple[_Step, Future[_Made]] | None = None

    def step(self, indices: list[int], *, more: bool) -> Iterator[Any]:
        """The prepared micro batches of the next step. Whatever preparing one raises is raised when that one is due.

        Args:
            indices: those of the samples are added to it before their micro batch is yielded.
            more: whether another step follows.
        """
        more = more and self._across_steps
        if self._upcoming is None:
            step = _Step(self._begin)
            self._asked = self._ask(step, more)
        else:
            (step, self._asked), self._upcoming = self._upcoming, None
        while True:
            made = self._asked.result()
            indices += made.indices[len(indices) :]
            if made.item is _END:
                return
            self._asked = self._ask(step, more)
            if made.done is not None:
                current = self._accelerator.current_stream()
                current.wait_event(made.done)
                _used_on(made.item, current)
            yield made.item

    def close(self) -> None:
        """End the thread, once it is done with what it is at."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def rest(self) -> None:
        """Wait until nothing is in the making."""
        if self._asked is not None:
            wait([self._asked])
        if self._upcoming is not None:
            wait([self._upcoming[1]])

    def _ask(self, step: _Step, more: bool) -> Future[_Made]:
        ready = self._accelerator.new_event()
        if ready is not None:
            ready.record(self._accelerator.current_stream())
        return self._thread.submit(self._make, step, more, ready)

    @torch.no_grad()  # grad mode belongs to a thread
    def _make(self, step: _Step, more: bool, ready: Any) -> _Made:
        with self._accelerator.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            item = step.next()
            done = self._accelerator.new_event()
            if done is not None:
                done.record(self._stream)
            if item is _END and more:
                upcoming = _Step(self._begin)
                self._upcoming = upcoming, self._ask(upcoming, more)
        return _Made(item, tuple(step.indices), done)


class StepInputs:
    """What the trainer gets its prepared micro batches from: ahead of time if `encode_ahead`, else when it asks for them.

    Args:
        begin: of a step.
        accelerator: of this rank.
        encode_ahead: whether the next ones are prepared beside the computation.
        streamed: whether the data's position in a checkpoint is that of what was read.
    """

    def __init__(
        self, begin: Begin, accelerator: Accelerator, *, encode_ahead: bool, streamed: bool = False
    ) -> None:
        self._begin = begin
        self._ahead = Ahead(begin, accelerator, across_steps=not streamed) if encode_ahead else None
        if encode_ahead:
            log.info("the next micro batch is encoded while one is trained on")

    def __enter__(self) -> StepInputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def step(self, indices: list[int], *, more: bool) -> Iterator[Any]:
        """See `Ahead.step`."""
        return self._begin(indices) if self._ahead is None else self._ahead.step(indices, more=more)

    def rest(self) -> None:
        """Wait until nothing is in the making; the encoders are free."""
        if self._ahead is not None:
            self._ahead.rest()


def _used_on(value: Any, stream: Any) -> None:
    """Tell the allocator that a stream uses the tensors inside dataclasses, mappings and sequences, which another one made:
    else it would give their memory away too early.
    """
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            value.record_stream(stream)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _used_on(getattr(value, field.name), stream)
    elif isinstance(value, Mapping):
        for one in value.values():
            _used_on(one, stream)
    elif isinstance(value, list | tuple):
        for one in value:
            _used_on(one, stream)
