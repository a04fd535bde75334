"""One process as a rank of a job: it meets the others, shares their first failure, and leaves in order or with them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from mm_core.accelerator import Accelerator
from mm_core.config import TrainFlags
from mm_core.config.environment import launched, read, whole_number
from mm_core.training.consensus import agree_on_plugins
from mm_core.training.failures import JobFailedError, describe, note, output_to_log
from mm_core.training.launch import LocalRanks
from mm_core.training.lifeline import Failure, Lifeline
from mm_core.training.meeting import Place, meet
from mm_registry import default_manager

log = logging.getLogger(__name__)


class Membership:
    """A context manager around all that a rank does between meeting the others and leaving.

    An error inside is told to the other ranks; the rank leaves with the first failure of the job, its own or another's.

    Args:
        flags: of this rank.
        children: the ranks that this process started, if any.
    """

    def __init__(self, flags: TrainFlags, children: LocalRanks | None = None) -> None:
        self.children = children
        self._flags = flags
        self._lifeline: Lifeline | None = None
        self._logs: Path | None = None

    def join(self, plugins: Mapping[str, Any] | None = None) -> None:
        """Meet the other ranks; what they agree on first is the plugins.

        Args:
            plugins: the set to compare; by default that of now.

        Raises:
            UserError: a rank is missing or cannot take part, or sees other plugins.
        """
        flags, accelerator, store = self._flags, Accelerator.current(), None
        if launched() and whole_number("WORLD_SIZE", 1) > 1:
            place = Place.here()
            met = meet(place, timedelta(minutes=flags.distributed_timeout_minutes))
            self._lifeline = Lifeline(place, met, self._leave)
            if self.children is not None:
                self.children.lifeline = self._lifeline
            store = dist.PrefixStore("group", met)
        accelerator.init_process_group(flags.distributed_backend, flags.distributed_timeout_minutes, store)
        if dist.get_world_size() > 1:
            agree_on_plugins(default_manager().plugin_set() if plugins is None else plugins)

    def log_to(self, logs: Path) -> None:
        """From here on the rank's log is in a folder of the run, and so is what it prints if nobody else shows it."""
        self._logs = logs
        if self.children is not None:
            self.children.logs = logs
        output_to_log(logs, dist.get_rank())

    def __enter__(self) -> Membership:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lifeline is None:
            if isinstance(error, Exception):
                note(error)
            return
        if error is None:
            self._lifeline.close()
        elif isinstance(error, Exception):
            note(error)
            if threading.current_thread() is threading.main_thread():
                # A launcher that sees another rank end sends SIGTERM; this one has something to say before it leaves.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if read("TORCHELASTIC_RUN_ID") is not None:
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                get_error_handler().record_exception(error)  # for torchrun's summary
            said, text = describe(error, self._flags.distributed_timeout_minutes)
            first = self._lifeline.report(said, text)
            self._lifeline.abandon()
            if first.rank != self._lifeline.rank and said != "user":
                raise JobFailedError(first, self._logs) from None
            if self._logs is not None and said != "user":
                log.error("this rank failed first; the log of every rank is in %s of its machine", self._logs)

    def _leave(self, first: Failure) -> None:
        """End the process, whose main thread cannot leave, with another rank's failure."""
        error = JobFailedError(first, self._logs)
        note(error)
        sys.stderr.write(f"\nerror: {error}\n")
        sys.stderr.flush()
        if self.children is not None:
            self.children.kill()
        os._exit(error.exit_code)
