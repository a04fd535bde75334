"""Checkpoints of a run: written by a thread beside the training, one at a time."""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from mm_core.weights.errors import CheckpointError
from mm_core.weights.retention import Retention
from mm_core.weights.writing import CheckpointWriter, Contents, Prepared

log = logging.getLogger(__name__)

_INTERRUPTED = 5.0  # seconds for the thread to end after Ctrl-C


class CheckpointSaver:
    """A context manager that saves a run's checkpoints; every rank has one and calls the same methods.

    While one is written, training goes on. The threads of the ranks agree among themselves, over a process group of their
    own, so that a failure on one rank is known to all. Leaving waits for the checkpoint that is being written: it is worth
    having also when the training failed. Only an interrupted run (Ctrl-C) gives it up.

    Args:
        run: the run's folder.
        asynchronous: `save` returns when a copy is made in host memory; otherwise when the checkpoint is complete.
        retention: which older ones stay.
        patience: until a rank that waits for another gives up.
    """

    def __init__(
        self,
        run: Path,
        *,
        asynchronous: bool = True,
        retention: Retention | None = None,
        patience: timedelta = timedelta(minutes=10),
    ) -> None:
        group = None
        if asynchronous and dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=patience)
        self._asynchronous = asynchronous
        self._writer = CheckpointWriter(run, group=group, retention=retention)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, contents: Contents) -> None:
        """Save a checkpoint, after the one that is still being written.

        Raises:
            WeightsError, CheckpointError: this one cannot be begun, or the one before failed, on some rank; every rank
                raises. Older ones are as they were.
        """
        if self._thread is not None and self._thread.is_alive():
            log.info("the checkpoint of step %d waits for %s, still being written", step, self._thread.name)
        self.finish()
        prepared = self._writer.prepare(step, contents, snapshot=self._asynchronous)
        if self._asynchronous:
            # A daemon: a run that was interrupted, or whose ranks lost each other, must not hang for it.
            self._thread = threading.Thread(
                target=self._write_beside, args=(prepared,), name=prepared.final.name, daemon=True
            )
            self._thread.start()
        else:
            self._write(prepared)

    @property
    def writing(self) -> bool:
        """Whether this rank is writing a checkpoint beside the training."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that was being written has failed; another rank may know it sooner than this one."""
        return self._error is not None

    def poll(self, failed: bool) -> None:
        """Notice a failure, once a step.

        Args:
            failed: whether `failed` is true on some rank. All ranks have to give the same, or one would raise while others
                wait for it in the next step.

        Raises:
            WeightsError, CheckpointError: it has failed.
        """
        if failed:
            self.finish()
            raise CheckpointError("a checkpoint could not be saved; another rank's log says why")

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any.

        Raises:
            WeightsError, CheckpointError: it has failed, on some rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
            return
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if thread.is_alive() and isinstance(error, Exception):
            log.info("%s is still being written; the run ends after it", thread.name)
        # Ranks whose peers are gone get an error from their connections to them, and the lifeline ends those that get none.
        if isinstance(error, Exception):
            thread.join()
        else:
            self._writer.cancel()
            thread.join(_INTERRUPTED)
        if self._error is not None:
            log.error("%s", self._error)

    def _write_beside(self, prepared: Prepared) -> None:
        try:
            self._writer.use_device()
            self._write(prepared)
        except BaseException as error:  # noqa: BLE001 - raised in the training's thread
            self._error = error

    def _write(self, prepared: Prepared) -> None:
        started = time.perf_counter()
        path = self._writer.write(prepared)
        log.info("checkpoint %s (%.1f s)", path, time.perf_counter() - started)
