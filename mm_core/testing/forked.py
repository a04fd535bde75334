"""Runs a function on several ranks, quickly: they are forked from a process that has imported everything.

    results = run_ranks(train, 2, steps=3)  # results[rank] is what train(...) returned there

Each rank gets a gloo process group over a store in a temporary file, one thread, and the variables of a
launcher. Functions can be local ones and closures; what they return must be picklable. A rank that raises,
dies or takes too long raises here, with its traceback, and no process is left behind.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(AssertionError):
    """A rank failed; the message has the traceback of each that reported one."""


class _UnmetError(RankError):
    """The ranks' connections were not made, so the function never ran."""


# Now and then gloo's sockets on a busy machine close each other ("connectFullMesh failed"), before anything was run.
_MEETINGS = 3


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, **kwargs: Any
) -> list[Any]:
    """Run `function(*args, **kwargs)` on forked ranks and return their results by rank.

    Args:
        timeout: seconds for all of it.

    Raises:
        RankError: a rank raised, died or did not finish in time.
    """
    for _ in range(_MEETINGS - 1):
        try:
            return _run_once(function, world_size, args, kwargs, timeout)
        except _UnmetError:
            continue
    return _run_once(function, world_size, args, kwargs, timeout)


def _run_once(
    function: Callable[..., Any], world_size: int, args: Any, kwargs: Any, timeout: float
) -> list[Any]:
    context = mp.get_context("fork")
    # A child that inherits a pool of threads, but not the threads, waits for them for ever.
    torch.set_num_threads(1)
    # What lives here keeps out of the children's garbage collection, which would copy its pages.
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(rank, world_size, Path(folder) / "store", theirs, timeout, function, args, kwargs),
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            return _collect(pipes, processes, timeout)
        finally:
            gc.unfreeze()
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    failed_at = 0.0
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    unmet = False
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        # After the first failure the others only get a moment: they may stand in a collective that cannot
        # end.
        left = min(deadline, failed_at + 3) - time.monotonic() if failures else deadline - time.monotonic()
        ready = wait(list(waiting), timeout=max(0.0, left))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                good, value = pipe.recv()
            except EOFError:
                processes[rank].join(1)
                good, value = False, f"died with exit code {processes[rank].exitcode}"
            if good:
                results[rank] = value
            else:
                if not failures:
                    failed_at = time.monotonic()
                failures[rank] = value
                unmet = unmet or good is None
    if failures:
        raise (_UnmetError if unmet else RankError)(
            "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items()))
        )
    if waiting:
        raise RankError(f"ranks {sorted(waiting.values())} did not finish within {timeout} s")
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int,
    world_size: int,
    store: Path,
    pipe: Connection,
    timeout: float,
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> None:
    signal.alarm(int(timeout) + 10)  # should the parent be killed
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MM_DEVICE="cpu",
    )
    good: bool | None = None  # None: the ranks did not meet
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        good = False
        result = function(*args, **kwargs)
        good = True
        pipe.send((good, result))
    except BaseException:  # noqa: BLE001 - reported to the parent, whatever it is
        pipe.send((False if good else good, traceback.format_exc()))
    pipe.close()
    # Not through the interpreter's exit: the forked copy of the parent has handlers and open files of its own.
    os._exit(0)
