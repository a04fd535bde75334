"""Commands in the background, several to a job: one for each machine, each task of srun, each launcher."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.conftest import ENVIRONMENT, ROOT, Job

BATCH = ("--micro-batch-size", "1", "--global-batch-size", "4")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Command:
    """`mm train` in the background; its output goes to a file."""

    def __init__(
        self, output: Path, *flags: str | Path, program: Sequence[str] = (), **variables: str
    ) -> None:
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *(program or ("-m", "mm_core")), "train", *Job().flags(*flags)], cwd=ROOT,
                env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", "MM_DEVICE": "cpu", **variables},
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def ranks(self) -> dict[int, int]:
        """The processes of this command that are ranks and no data workers: rank -> process."""
        found = {}
        waiting = [self.process.pid]
        while waiting:
            pid = waiting.pop()
            try:
                waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            if rank := re.search(r"(?:^|\0)RANK=(\d+)", text):
                found[int(rank[1])] = pid
        return found


@contextmanager
def ended(*commands: Command, later: Sequence[Command] = ()) -> Iterator[None]:
    """Whatever happens inside, nothing of the commands is left, nor of those that are put into `later`."""
    try:
        yield
    finally:
        commands += tuple(later)
        for command in commands:
            if command.process.poll() is None:
                command.process.kill()
            command.process.wait()


def wait_for(condition: Path, *commands: Command, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition.exists():
        for command in commands:
            assert command.process.poll() is None, command.text
        assert time.monotonic() < deadline, commands[0].text
        time.sleep(0.05)


def machines(folder: Path, run: Path, *flags: str | Path, count: int = 2, each: int = 2) -> list[Command]:
    """The same command for each machine, but for its number."""
    port = free_port()
    return [
        Command(
            folder / f"machine-{node}.txt", *BATCH, "--save", run, "--nnodes", str(count), "--node_rank", str(node),
            "--nproc-per-node", str(each), "--master_addr", "localhost", "--master_port", port, *flags,
        )
        for node in range(count)
    ]  # fmt: skip


def gone(processes: Iterable[int]) -> bool:
    """Whether processes end within a while."""
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(Path(f"/proc/{pid}").exists() for pid in processes)


def tensors(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"iter_{step:07d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.distcp"))}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def srun(folder: Path, tasks: int, nodes: int, *flags: str | Path, odd: Sequence[str] = ()) -> list[Command]:
    """What srun starts: the same command everywhere, and variables. The last task gets the flags `odd` as well."""
    each = tasks // nodes
    job = str(os.getpid() * 100 + time.monotonic_ns() % 100)
    return [
        Command(
            folder / f"task-{task}.txt", *flags, *(odd if task == tasks - 1 else ()),
            SLURM_JOB_ID=job, SLURM_STEP_ID="0", SLURM_PROCID=str(task), SLURM_NTASKS=str(tasks), SLURM_STEP_NUM_TASKS=str(tasks),
            SLURM_LOCALID=str(task % each), SLURM_NODEID=str(task // each), SLURM_NNODES=str(nodes),
            SLURM_STEP_NUM_NODES=str(nodes), SLURM_STEP_TASKS_PER_NODE=f"{each}(x{nodes})",
            SLURM_STEP_NODELIST=",".join(["localhost"] * nodes),
        )
        for task in range(tasks)
    ]  # fmt: skip
