"""Starting the ranks of one machine.

`mm train --nproc-per-node 2` runs rank 0 in the command's own process and starts the others as children with
the same command line. Under torchrun (or anything else that sets RANK and WORLD_SIZE) nothing is started. A
child dies with its parent, and a child that fails takes the job down, its message on top.
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
from typing import IO

import torch

from mm_core.config import TrainFlags
from mm_core.config.environment import launched, read
from mm_core.training.stop import EXIT_TERMINATED
from mm_registry.errors import UserError

_PARENT = "MM_PARENT_PID"
_THREADS = "OMP_NUM_THREADS"
_TOLD_BY_ALL = (2, 130)  # a user's mistake, Ctrl-C: what every rank meets by itself


def started_by_launcher() -> bool:
    """Whether torchrun, SLURM's srun with torchrun's variables, or we ourselves already set the rank."""
    return launched()


def die_with_parent() -> None:
    """In a child of ours: ask the kernel to kill this process when the parent goes (Linux)."""
    parent = read(_PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it went before the call above
        os._exit(1)


def check_launch(flags: TrainFlags) -> None:
    """Refuse `--nproc-per-node` under a launcher that disagrees, and machines that cannot find each other.

    Raises:
        UserError: the two numbers of processes differ, several machines have no common address, or a launcher's
            variables are incomplete or no numbers.
    """
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        value = read(name)
        if value is not None and read(other) is None:
            raise UserError(
                f"{name}={value} is set in the environment, but {other} is not: each process would train by itself; "
                f"set both (torchrun does), or unset {name}."
            )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        value = read(name)
        value = "0" if value is None else value
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"{name}={value} in the environment is no number; torchrun sets it, or unset it.")
    if not started_by_launcher():
        if (flags.nnodes or 1) > 1 and flags.master_addr is None:
            raise UserError(
                f"--nnodes {flags.nnodes}: the machines need --master-addr, the address of the first one, "
                "to meet at; or start them with torchrun."
            )
        return
    if read(_PARENT) is not None or flags.nproc_per_node is None:
        return
    local = read("LOCAL_WORLD_SIZE") or read("WORLD_SIZE")
    if str(flags.nproc_per_node) != local:
        raise UserError(
            f"--nproc-per-node {flags.nproc_per_node}: the launcher already started {local} processes on this "
            "machine; leave the flag out under torchrun."
        )


class LocalRanks:
    """The children of this process: ranks 1… of this machine.

    A context manager: inside, this process is rank 0 (its variables say so); leaving it waits for the
    children and puts the variables back.
    """

    def __init__(self, flags: TrainFlags, argv: Sequence[str]) -> None:
        self.count = flags.nproc_per_node or 1
        nodes = flags.nnodes or 1
        node = flags.node_rank or 0
        self._argv = list(argv)
        self._children: list[tuple[subprocess.Popen[bytes], IO[bytes], threading.Thread]] = []
        self._stopping = threading.Event()
        self._before: dict[str, str | None] = {}
        self._threads = torch.get_num_threads()
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
        variables = self._variables(0)
        if self.count > 1 and read(_THREADS) is None:
            threads = max(1, (os.cpu_count() or 1) // self.count)
            variables[_THREADS] = str(threads)
            torch.set_num_threads(threads)  # torch read the variable when it was imported
        self._before = {name: read(name) for name in variables}
        os.environ.update(variables)
        for local_rank in range(1, self.count):
            # It has no name, so that nothing is left of it, however this process ends.
            output = tempfile.TemporaryFile()
            child = subprocess.Popen(
                [sys.executable, "-m", "mm_core", "train", *self._argv],
                env={**os.environ, **self._variables(local_rank), _PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            watch = threading.Thread(target=self._watch, args=(local_rank, child, output), daemon=True)
            self._children.append((child, output, watch))
            watch.start()
        return self

    def _watch(self, local_rank: int, child: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        code = child.wait()
        if code in (0, EXIT_TERMINATED):  # the ranks agreed to stop: this process leaves by itself
            return
        # What every rank meets is told once, by this process; it gets a moment to do so.
        if self._stopping.wait(timeout=3.0 if code in _TOLD_BY_ALL else 0.0):
            return
        self._stopping.set()
        sys.stderr.write(
            f"\nerror: rank {self._first_rank + local_rank} ended with exit code {code}; its last words:\n"
            f"{_tail(output)}\n"
        )
        sys.stderr.flush()
        self._kill()
        # Rank 0 may stand in a collective that will never end; only leaving the process ends it.
        os._exit(code if code in _TOLD_BY_ALL else 1)

    def _kill(self) -> None:
        for child, _, _ in self._children:
            if child.poll() is None:
                child.kill()

    def terminate(self) -> None:
        """Pass SIGTERM on, so that every rank takes part in the last save."""
        for child, _, _ in self._children:
            if child.poll() is None:
                child.terminate()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stopping.set()
            self._kill()
        for child, output, watch in self._children:
            child.wait()
            watch.join()  # it ends this process, should the child have failed after all
            output.close()
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if _THREADS in self._before:
            torch.set_num_threads(self._threads)


def _tail(output: IO[bytes], size: int = 4000) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - size))
    return output.read().decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
