"""Byte ranges of safetensors files into tensors: several threads, no mapping of files, memory bounded by a few chunks.

What a file holds in the destination's own type and order is read straight into the destination's memory. The rest
passes through a buffer per thread, where it is converted, cut or laid on its side.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from mm_core.config.environment import whole_number
from mm_core.weights.errors import WeightsError
from mm_core.weights.headers import Located
from mm_core.weights.recipe import Box, Shape
from mm_core.weights.tensors import TORCH_DTYPES

_CHUNK = 4 << 20  # bytes of a read; a buffer per thread is as long
_GAP = 32 << 10  # bytes between two ranges below which reading on is cheaper than a second read
_PIECES = 256  # small reads of one task


@dataclass(frozen=True, slots=True)
class Read:
    """A part of a stored tensor, and the tensor of that part's shape that is to have its values."""

    source: Located
    box: Box
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Span:
    """Consecutive bytes of a file that are read at once."""

    offset: int
    nbytes: int
    strides: tuple[int, ...]  # in elements, of the values within these bytes
    dtype: torch.dtype
    target: torch.Tensor


def read_all(reads: Iterable[Read], *, advance: Callable[[int], None] | None = None) -> int:
    """Fill all targets; values are converted to their types on the way.

    Args:
        advance: called in this thread with numbers of bytes as they arrive.

    Returns:
        Bytes read.

    Raises:
        WeightsError: a file cannot be opened or ends too early.
    """
    ordered = sorted(reads, key=lambda read: (str(read.source.file), read.source.offset))
    buffers = threading.local()
    total = 0
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        for file in dict.fromkeys(read.source.file for read in ordered):
            files[file] = _open(file)
            stack.callback(os.close, files[file])
        pool = stack.enter_context(ThreadPoolExecutor(_threads(), thread_name_prefix="weights"))
        try:
            futures = [pool.submit(_run, task, files[file], file, buffers) for file, task in _tasks(ordered)]
            for future in as_completed(futures):
                total += future.result()
                if advance is not None:
                    advance(future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # files are closed only when nobody reads them
            raise
    return total


def planned_bytes(reads: Iterable[Read]) -> int:
    """What `read_all` is going to read."""
    return sum(span.nbytes for read in reads for span in _spans(read))


def _threads() -> int:
    """As many as this rank's share of the processors, but enough to keep a disk busy."""
    share = len(os.sched_getaffinity(0)) // max(1, whole_number("LOCAL_WORLD_SIZE", 1))
    return max(4, min(16, share))


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}") from error


def _tasks(reads: Iterable[Read]) -> Iterator[tuple[Path, list[_Span]]]:
    """Spans that one thread reads one after the other: of one file, a chunk's worth of bytes."""
    file: Path | None = None
    task: list[_Span] = []
    size = 0
    for read in reads:
        for span in _spans(read):
            full = size + span.nbytes > _CHUNK or len(task) == _PIECES
            if task and (full or read.source.file != file):
                assert file is not None
                yield file, task
                task, size = [], 0
            file = read.source.file
            task.append(span)
            size += span.nbytes
    if file is not None and task:
        yield file, task


def _spans(read: Read) -> Iterator[_Span]:
    """The byte ranges of a part of a tensor, none longer than a chunk, near ones as one."""
    dtype = TORCH_DTYPES[read.source.tensor.dtype]
    shape: Shape = read.source.tensor.shape
    sizes = [part.stop - part.start for part in read.box]
    if 0 in sizes:
        return
    count, itemsize = len(shape), dtype.itemsize
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(count))
    steps = [stride * itemsize for stride in strides]
    lengths = [itemsize] * (count + 1)  # from the first to the last byte of dimensions i, i + 1, …
    near = [True] * (count + 1)  # no long gap among them
    for i in reversed(range(count)):
        lengths[i] = (sizes[i] - 1) * steps[i] + lengths[i + 1]
        near[i] = near[i + 1] and (sizes[i] == 1 or steps[i] - lengths[i + 1] <= _GAP)
    first = read.source.offset + sum(part.start * step for part, step in zip(read.box, steps, strict=True))

    def cut(i: int, offset: int, target: torch.Tensor) -> Iterator[_Span]:
        if i == count or (near[i] and lengths[i] <= _CHUNK):
            yield _Span(offset, lengths[i], strides, dtype, target)
            return
        rows = _CHUNK // steps[i] if near[i] else 0
        if rows < 2:
            for row in range(sizes[i]):
                yield from cut(i + 1, offset + row * steps[i], target.narrow(i, row, 1))
            return
        for row in range(0, sizes[i], rows):
            some = min(rows, sizes[i] - row)
            length = (some - 1) * steps[i] + lengths[i + 1]
            yield _Span(offset + row * steps[i], length, strides, dtype, target.narrow(i, row, some))

    yield from cut(0, first, read.target)


def _run(task: list[_Span], descriptor: int, file: Path, buffers: threading.local) -> int:
    """Read the spans of one task; returns their bytes."""
    total = 0
    for span in task:
        target = span.target
        dense = target.numel() * span.dtype.itemsize == span.nbytes
        if dense and target.is_cpu and target.dtype == span.dtype and target.is_contiguous():
            _fill(descriptor, file, span.offset, target.reshape(-1).view(torch.uint8))
        else:
            buffer = getattr(buffers, "bytes", None)
            if buffer is None:
                buffer = buffers.bytes = torch.empty(_CHUNK, dtype=torch.uint8)
            raw = buffer[: span.nbytes]
            _fill(descriptor, file, span.offset, raw)
            target.copy_(raw.view(span.dtype).as_strided(target.shape, span.strides))
        total += span.nbytes
    return total


def _fill(descriptor: int, file: Path, offset: int, target: torch.Tensor) -> None:
    """Read as many bytes as the target has."""
    rest = memoryview(target.numpy())
    while rest:
        try:
            count = os.preadv(descriptor, [rest], offset)
        except OSError as error:
            raise WeightsError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}") from error
        if count == 0:
            raise WeightsError(f"{file} was cut off while it was read; fetch it again")
        offset += count
        rest = rest[count:]
