"""Starting the ranks of one machine.

`mm train --nproc-per-node 2` runs rank 0 in the command's own process and starts the others as children with
the same command line. Under torchrun (or anything else that sets RANK and WORLD_SIZE) nothing is started. A
child dies with its parent, and a child that fails takes the job down, its message on top: through the lifeline of
the job once the ranks have met, before that by itself.
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
from typing import IO

import torch

from mm_core.config import TrainFlags
from mm_core.config.document import expanded
from mm_core.config.environment import launched, read, whole_number
from mm_core.config.flags import split_endpoint
from mm_core.training.failures import describe_exit, keep_output, log_file, tail
from mm_core.training.lifeline import Lifeline
from mm_core.training.meeting import Place, refuse
from mm_core.training.stop import EXIT_TERMINATED
from mm_registry.errors import UserError

PARENT = "MM_PARENT_PID"
_THREADS = "OMP_NUM_THREADS"
EXIT_USER = 2
_PORT = 29500
_PATIENCE = 5.0  # seconds
_TOLD_BY_ALL = (EXIT_USER, 130)  # a user's mistake, Ctrl-C: what every rank meets by itself


def started_by_launcher() -> bool:
    """Whether torchrun, SLURM's srun with torchrun's variables, or we ourselves already set the rank."""
    return launched()


def die_with_parent() -> None:
    """In a child of ours: ask the kernel to kill this process when the parent goes (Linux)."""
    parent = read(PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it went before the call above
        os._exit(1)


def checks_its_machine() -> bool:
    """Whether this rank checks the build for its machine: not if the command that started it did, else its first."""
    return read(PARENT) is None and (read("LOCAL_RANK") or "0") == "0"


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
        if name == "MASTER_PORT" and int(value) > 65535:
            raise UserError(
                f"MASTER_PORT={value} in the environment is no port; use 1 to 65535, or unset it."
            )
    if not started_by_launcher():
        if flags.machines[1] > 1 and not flags.elastic and _address(flags) is None:
            raise UserError(
                f"--nnodes {flags.nnodes}: the machines need --master-addr, the address of the first one, "
                "to meet at; or start them with torchrun or srun."
            )
        if flags.machines[1] > 1 and flags.elastic and not (flags.rdzv_endpoint or flags.master_addr):
            raise UserError(
                f"--nnodes {flags.nnodes}: the machines of an elastic job need --rdzv-endpoint, HOST:PORT of one of them."
            )
        return
    if read(PARENT) is not None or flags.nproc_per_node is None:
        return
    local = read("LOCAL_WORLD_SIZE") or read("WORLD_SIZE")
    if str(flags.nproc_per_node) != local:
        raise UserError(
            f"--nproc-per-node {flags.nproc_per_node}: the launcher already started {local} processes on this "
            "machine; leave the flag out under torchrun."
        )


def shared_threads(ranks: int) -> dict[str, str]:
    """The variable that shares out the machine's cores to several ranks, unless the user has set it."""
    if ranks == 1 or read(_THREADS) is not None:
        return {}
    return {_THREADS: str(max(1, (os.cpu_count() or 1) // ranks))}


class LocalRanks:
    """The children of this process: ranks 1… of this machine.

    A context manager: inside, this process is rank 0 (its variables say so); leaving it waits for the
    children and puts the variables back.

    Args:
        argv: what follows `mm COMMAND` on their command line.
        command: the command.
    """

    def __init__(self, flags: TrainFlags, argv: Sequence[str], command: str = "train") -> None:
        self.count = flags.nproc_per_node or 1
        self._command = command
        nodes = flags.machines[1]
        node = flags.node_rank or 0
        self.lifeline: Lifeline | None = None
        self.logs: Path | None = None  # the run's, once it is open
        self._argv = list(argv)
        self._save = flags.save
        self._children: list[tuple[subprocess.Popen[bytes], IO[bytes], threading.Thread]] = []
        self._stopping = threading.Event()
        self._before: dict[str, str | None] = {}
        self._threads = torch.get_num_threads()
        port = _port(flags) or (_free_port() if nodes == 1 else _PORT)
        self._environment = {
            "MASTER_ADDR": _address(flags) or "127.0.0.1",
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
        variables = {**self._variables(0), **shared_threads(self.count)}
        if _THREADS in variables:
            torch.set_num_threads(int(variables[_THREADS]))  # torch read the variable when it was imported
        self._before = {name: read(name) for name in variables}
        os.environ.update(variables)
        for local_rank in range(1, self.count):
            # It has no name, so that nothing is left of it, however this process ends.
            output = tempfile.TemporaryFile()
            child = subprocess.Popen(
                [sys.executable, "-m", "mm_core", self._command, *self._argv],
                env={**os.environ, **self._variables(local_rank), PARENT: str(os.getpid())},
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
        rank = self._first_rank + local_rank
        words = f"ended with {describe_exit(code)}; its last words:\n{self._last_words(rank, output, code)}"
        if self.lifeline is not None and self.lifeline.holds:
            # The first failure of the job may be another one. This process leaves with it, by main thread or lifeline.
            self.lifeline.report("user" if code == EXIT_USER else "ended", f"it {words}", rank=rank)
            if self.lifeline.first is not None:
                return
        self._stopping.set()
        sys.stderr.write(f"\nerror: rank {rank} {words}\n")
        sys.stderr.flush()
        self.kill()
        # Rank 0 may stand in a collective that will never end; only leaving the process ends it.
        os._exit(code if code in _TOLD_BY_ALL else 1)

    def _last_words(self, rank: int, output: IO[bytes], code: int) -> str:
        """The end of what a rank that died had printed or logged, and the place of the rest."""
        if self.logs is not None and log_file(self.logs, rank).exists():
            with log_file(self.logs, rank).open("rb") as file:
                return f"{tail(file)}\n(whole log: {log_file(self.logs, rank)})"
        words = tail(output)
        if code in _TOLD_BY_ALL:
            return words
        kept = keep_output(output, expanded(self._save) / "logs" if self._save else None, rank)
        return f"{words}\n(whole log: {kept})" if kept else words

    def kill(self) -> None:
        """End the children at once."""
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
            self.kill()
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


def refuse_machine(flags: TrainFlags, text: str) -> None:
    """Tell the ranks of the other machines that this one does not start its own, if they are waiting already."""
    nodes, count, address = flags.machines[1], flags.nproc_per_node or 1, _address(flags)
    if nodes > 1 and address is not None and not flags.elastic:
        place = Place((flags.node_rank or 0) * count, nodes * count, address, _port(flags) or _PORT)
        refuse(text, place, timeout=_PATIENCE)


def _address(flags: TrainFlags) -> str | None:
    """Where the machines meet: `--master-addr`, the host of `--rdzv-endpoint`, or MASTER_ADDR."""
    if flags.machines[1] == 1:
        return flags.master_addr
    return flags.master_addr or split_endpoint(flags.rdzv_endpoint or "")[0] or read("MASTER_ADDR")


def _port(flags: TrainFlags) -> int | None:
    if flags.machines[1] == 1:
        return flags.master_port
    return (
        flags.master_port
        or split_endpoint(flags.rdzv_endpoint or "")[1]
        or whole_number("MASTER_PORT", 0)
        or None
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
