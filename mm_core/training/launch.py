"""Starting the ranks of one machine.

`mm train --nproc-per-node 2` runs rank 0 in the command's own process and starts the others as children with the same command
line. Under torchrun (or anything else that sets RANK and WORLD_SIZE) nothing is started. A child dies with its parent, and a child
that fails takes the job down, its message on top.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from mm_core.config import TrainFlags
from mm_registry.errors import UserError

_PARENT = "MM_PARENT_PID"


def started_by_launcher() -> bool:
    """Whether torchrun, SLURM's srun with torchrun's variables, or we ourselves already set this process's rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def die_with_parent() -> None:
    """In a child of ours: ask the kernel to kill this process when the parent goes (Linux)."""
    parent = os.environ.get(_PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it went before the call above
        os._exit(1)


def check_launch(flags: TrainFlags) -> None:
    """Refuse `--nproc-per-node` under a launcher that disagrees.

    Raises:
        UserError: the two numbers of processes differ.
    """
    if not started_by_launcher() or _PARENT in os.environ or flags.nproc_per_node is None:
        return
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    if str(flags.nproc_per_node) != local:
        raise UserError(
            f"--nproc-per-node {flags.nproc_per_node}: the launcher already started {local} processes on this machine; "
            "leave the flag out under torchrun."
        )


class LocalRanks:
    """The children of this process: ranks 1… of this machine. A context manager; leaving it waits for them."""

    def __init__(self, flags: TrainFlags, argv: Sequence[str]) -> None:
        self.count = flags.nproc_per_node or 1
        nodes = flags.nnodes or 1
        node = flags.node_rank or 0
        self._argv = list(argv)
        self._children: list[tuple[int, subprocess.Popen[bytes], Path]] = []
        self._stopping = threading.Event()
        port = flags.master_port or (_free_port() if nodes == 1 else 29500)
        self._environment = {
            "MASTER_ADDR": flags.master_addr or "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.count * nodes),
            "LOCAL_WORLD_SIZE": str(self.count),
        }
        self._first_rank = node * self.count

    def _variables(self, local_rank: int) -> dict[str, str]:
        return {
            **self._environment,
            "RANK": str(self._first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
        }

    def __enter__(self) -> LocalRanks:
        threads = str(max(1, (os.cpu_count() or 1) // self.count))
        if self.count > 1:
            os.environ.setdefault("OMP_NUM_THREADS", threads)
        os.environ.update(self._variables(0))
        folder = Path(tempfile.mkdtemp(prefix="mm-ranks-"))
        for local_rank in range(1, self.count):
            output = folder / f"rank-{local_rank}.txt"
            child = subprocess.Popen(
                [sys.executable, "-m", "mm_core", "train", *self._argv],
                env={**os.environ, **self._variables(local_rank), _PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output.open("wb"),
                stderr=subprocess.STDOUT,
            )
            self._children.append((local_rank, child, output))
        for entry in self._children:
            threading.Thread(target=self._watch, args=entry, daemon=True).start()
        return self

    def _watch(self, local_rank: int, child: subprocess.Popen[bytes], output: Path) -> None:
        code = child.wait()
        # A mistake that every rank meets is told once, by this process; it gets a moment to do so.
        if code == 0 or self._stopping.wait(timeout=3.0 if code == 2 else 0.0):
            return
        self._stopping.set()
        tail = output.read_text(errors="replace")[-4000:]
        sys.stderr.write(f"\nerror: rank {local_rank} ended with exit code {code}; its last words:\n{tail}\n")
        sys.stderr.flush()
        self._kill()
        # Rank 0 may stand in a collective that will never end; only leaving the process ends it.
        os._exit(code if code in (2, 143) else 1)

    def _kill(self) -> None:
        for _, child, _ in self._children:
            if child.poll() is None:
                child.kill()

    def terminate(self) -> None:
        """Pass SIGTERM on, so that every rank takes part in the last save."""
        for _, child, _ in self._children:
            if child.poll() is None:
                child.terminate()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, SystemExit):
            self._stopping.set()
            self._kill()
        for _, child, output in self._children:
            child.wait()
            output.unlink(missing_ok=True)
        if self._children:
            self._children[0][2].parent.rmdir()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
