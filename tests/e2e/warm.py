"""`mm train` in processes of its own that are forked from a server which has imported everything, so that a start takes
a second: for tests that need many. A process can be killed at an operation on files of its own choosing.

The server is multiprocessing's; nothing of the test process is inherited. Several ranks get the variables that a
launcher sets.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.conftest import ENVIRONMENT, ROOT
from tests.e2e.launched import free_port

_IMPORTED = (
    "mm_core.cli.train", "mm_core.training.session", "mm_core.training.tasks.diffusion", "mm_core.data.t2v",
    "mm_core.models.text_encoders", "mm_plugin_wan22.predictor", "mm_plugin_haar", "torch.utils.tensorboard", "av",
    "transformers.models.umt5.modeling_umt5", "transformers.tokenization_utils_fast",
)  # fmt: skip
#: Python's audit events of what changes a folder, and what they are part of. Each comes before it is done.
KINDS = {
    "open": "write", "os.mkdir": "write", "os.truncate": "write", "os.link": "write",
    "os.rename": "rename", "os.remove": "cleanup", "os.rmdir": "cleanup",
}  # fmt: skip
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Moment:
    """When a process kills itself, or is asked to end.

    Attributes:
        kind: of operation, a value of `KINDS`.
        number: of the operations of this kind under `folder`, counted from 1.
        folder: where the operations are counted.
        delay: seconds after the operation began; 0 is right before it.
        signal: that it sends to itself and whatever it started.
    """

    kind: str
    number: int
    folder: Path
    delay: float = 0.0
    signal: int = signal.SIGKILL


class Warm:
    """A rank's process."""

    def __init__(
        self, output: Path, arguments: Sequence[str], variables: dict[str, str], moment: Moment | None
    ) -> None:
        self.output = output
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with _variables({**ENVIRONMENT, "OMP_NUM_THREADS": "1", "PRELOAD_MM": "1"}):
            self.process = context.Process(target=_run, args=(output, list(arguments), variables, moment))
            self.process.start()

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def kill(self) -> None:
        self.process.kill()

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; `None` if it still runs."""
        self.process.join(seconds)
        return self.code


def ranks(
    output: Path, arguments: Sequence[str], world: int = 1, moments: dict[int, Moment] | None = None
) -> list[Warm]:
    """Start the ranks of one job.

    Args:
        output: what they print goes to files with this name and the rank's number.
        moments: rank -> when it kills itself.
    """
    moments = moments or {}
    common = {"MM_DEVICE": "cpu"}
    if world > 1:
        common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        common["MASTER_PORT"] = free_port()
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {} for rank in range(world)]
    return [
        Warm(output.with_name(f"{output.name}.{rank}"), arguments, {**common, **own[rank]}, moments.get(rank))
        for rank in range(world)
    ]


def finish(processes: Sequence[Warm], seconds: float = 120) -> list[int | None]:
    """Wait for all, and leave none behind. When the first of several dies, the others get a while to notice; the code of
    one that does not is None.
    """
    deadline = time.monotonic() + seconds
    try:
        while any(one.code is None for one in processes) and time.monotonic() < deadline:
            if any(one.code for one in processes):
                deadline = min(deadline, time.monotonic() + 60)
            time.sleep(0.02)
        return [one.code for one in processes]
    finally:
        for one in processes:
            if one.code is None:
                one.kill()
                one.wait(30)


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Any:
    """The server takes the environment of the moment at which the first process is asked for."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(output: Path, arguments: list[str], variables: dict[str, str], moment: Moment | None) -> None:
    os.setpgid(0, 0)  # a kill takes along whatever this process started
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(out, stream.fileno())
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = ["mm", *arguments]
    if moment is not None:
        sys.addaudithook(_killer(moment))
    from mm_core.cli.main import main

    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the command: without waiting for peers in destructors


def _killer(moment: Moment) -> Callable[[str, tuple[Any, ...]], None]:
    under = str(moment.folder) + os.sep
    seen = 0

    def die() -> None:
        time.sleep(moment.delay)
        os.killpg(0, moment.signal)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if KINDS.get(event) != moment.kind or not _path(event, details).startswith(under):
            return
        seen += 1
        if seen == moment.number:
            if moment.delay:
                threading.Thread(target=die).start()
            else:
                die()

    return hook


def _path(event: str, details: tuple[Any, ...]) -> str:
    """The path that an operation changes; "" if it changes nothing."""
    path, *rest = details
    if event == "open" and not rest[1] & _CHANGES:
        return ""
    if not isinstance(path, str | bytes | os.PathLike):  # the number of an open file
        return ""
    text = os.fsdecode(path)
    descriptor = rest[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1
    if descriptor is not None and descriptor != -1:
        return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), text)
    return os.path.abspath(text)


if os.environ.get("PRELOAD_MM"):  # in the server
    for _name in _IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(_name)
