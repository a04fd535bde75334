"""How a rank fails: what is told of it, and where its last words are kept."""

from __future__ import annotations

import logging
import os
import re
import signal
import stat
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO

import torch.distributed as dist

from mm_core.config.environment import read
from mm_core.training.lifeline import Failure, Kind
from mm_registry.errors import UserError

#: What a collective says when another rank went away, in the words of gloo, NCCL, HCCL and torch's stores.
_BROKEN = re.compile(
    r"gloo|NCCL|HCCL|ProcessGroup|process group|Connection (closed|reset|refused)|Broken pipe|Socket ?Timeout|store",
    re.I,
)
_LATE = re.compile(r"tim(ed|e) ?out|timeout", re.I)
_TAIL = 4000  # bytes


class JobFailedError(UserError):
    """Another rank failed first; the message has its words, and a traceback of this one would only hide them."""

    def __init__(self, first: Failure, logs: Path | None = None) -> None:
        self.exit_code = first.exit_code
        text = str(first)
        if (read("LOCAL_RANK") or "0") != "0":  # one rank of each machine tells it whole
            text = text.partition("\n")[0]
        elif logs is not None:
            text = f"{text}\nThe log of every rank is in {logs} of its machine."
        super().__init__(text)


def describe(error: BaseException, minutes: float) -> tuple[Kind, str]:
    """Return the kind and the words of an error of this rank.

    Args:
        minutes: `--distributed-timeout-minutes`, for an error of a collective that nobody joined.
    """
    if isinstance(error, UserError):
        return ("user" if error.exit_code == 2 else "error"), str(error)
    text = "".join(traceback.format_exception(error)).rstrip()
    if not isinstance(error, dist.DistError) and not (
        isinstance(error, RuntimeError) and _BROKEN.search(str(error))
    ):
        return "error", f"{type(error).__name__}: {error}\n{text}"
    if _LATE.search(str(error)):
        return "follow-up", (
            f"a collective waited longer than --distributed-timeout-minutes {minutes:g}: some rank did not take part. Compare "
            "the last lines of all ranks' logs; if one was only slow (a first compilation, a slow disk), give more minutes.\n"
            f"{text}"
        )
    return "follow-up", f"the connection to another rank broke.\n{text}"


def describe_exit(code: int) -> str:
    """`exit code -9 (SIGKILL: …)`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"
    why = {
        "SIGKILL": "somebody killed it, most likely the system, out of memory: see dmesg or the job's memory limit",
        "SIGABRT": "the C++ side gave up, after a time-out of NCCL or HCCL for example: see its log",
        "SIGSEGV": "a crash in C++ code",
        "SIGBUS": "a crash in C++ code, or shared memory (/dev/shm) is full",
    }.get(name)
    return f"exit code {code} ({name}{f': {why}' if why else ''})"


def log_file(logs: Path, rank: int) -> Path:
    """The log of a rank; `setup_logging` writes there too."""
    return logs / f"rank-{rank:05d}.log"


def note(error: BaseException) -> None:
    """Write an error's traceback to the rank's log file; the console gets it from the command, if at all."""
    trace = "".join(traceback.format_exception(error))
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(
                logging.LogRecord(
                    __name__, logging.ERROR, __file__, 0, "this rank failed:\n%s", (trace,), None
                )
            )


def output_to_log(logs: Path, rank: int) -> None:
    """In a rank that `mm train` started, whose output goes to a nameless file: let it go to the rank's log from here on,
    with what it printed so far.
    """
    if read("MM_PARENT_PID") is None or read("LOCAL_RANK") == "0" or not stat.S_ISREG(os.fstat(1).st_mode):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    before = _printed(1) + (b"" if os.path.sameopenfile(1, 2) else _printed(2))
    log = os.open(log_file(logs, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if before:
        os.write(log, before)
        for descriptor in (1, 2):
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.ftruncate(descriptor, 0)  # what a rank leaves in there is in no log
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _printed(descriptor: int) -> bytes:
    """What went to a file so far that may have no name; only Linux can tell."""
    try:
        return Path(f"/proc/self/fd/{descriptor}").read_bytes()
    except OSError:
        return b""


def keep_output(output: IO[bytes], logs: Path | None, rank: int) -> Path | None:
    """Keep what a rank printed that died before it had a log. Return the file; None if it printed nothing.

    Args:
        logs: the run's; a temporary folder that stays if the job saves nothing.
    """
    output.seek(0)
    text = output.read()
    if not text:
        return None
    if logs is None:
        logs = Path(tempfile.mkdtemp(prefix="mm-train-"))
    logs.mkdir(parents=True, exist_ok=True)
    with log_file(logs, rank).open("ab") as file:
        file.write(text)
    return log_file(logs, rank)


def tail(file: IO[bytes], size: int = _TAIL) -> str:
    """The last words in a file."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - size))
    return file.read().decode(errors="replace")
