"""Several machines (each a command here), SLURM, ranks that die and are started again: real commands, real kills."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import ENVIRONMENT, ROOT, Job, losses, metrics, train

pytestmark = pytest.mark.timeout(600)

_BATCH = ("--micro-batch-size", "1", "--global-batch-size", "4")


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
            except FileNotFoundError:
                continue
            if rank := re.search(r"(?:^|\0)RANK=(\d+)", text):
                found[int(rank[1])] = pid
        return found


@contextmanager
def ended(*commands: Command) -> Iterator[None]:
    """Whatever happens inside, nothing of the commands is left."""
    try:
        yield
    finally:
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
            folder / f"machine-{node}.txt", *_BATCH, "--save", run, "--nnodes", str(count), "--node_rank", str(node),
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    run = tmp_path_factory.mktemp("many") / "alone"
    result = train(Job(), run, steps=3, batch=(1, 4), OMP_NUM_THREADS="1")
    assert result.code == 0, result.err
    return losses(run)


# -- several machines


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_machines_give_the_losses_of_one_process(alone: list[float], tmp_path: Path, each: int) -> None:
    run = tmp_path / "run"
    commands = machines(tmp_path, run, "--train-iters", "3", each=each)
    with ended(*commands):
        assert [command.wait() for command in commands] == [0, 0], commands[0].text + commands[1].text
    assert losses(run) == pytest.approx(alone, rel=1e-5)
    assert sorted(path.name for path in (run / "logs").glob("rank-*")) == [
        f"rank-{rank:05d}.log" for rank in range(4)
    ]
    assert "step 3/3" in commands[0].text
    assert commands[1].text == "", "rank 0 speaks for the job"


@pytest.mark.slow
def test_a_killed_rank_ends_both_machines(tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = machines(tmp_path, run, "--train-iters", "100000")
    with ended(*commands):
        wait_for(run / "metrics.jsonl", *commands)
        os.kill(commands[1].ranks()[3], signal.SIGKILL)
        assert [command.wait(60) for command in commands] == [1, 1]
    for command in commands:
        error = command.text[command.text.index("error: ") :]
        assert error.startswith("error: rank 3 (")
        assert "failed first" in error
        assert f"The log of every rank is in {run / 'logs'}" in error
        assert "Traceback" not in error, "what the others met is in their logs"
    assert "SIGKILL" in commands[1].text, "its own machine knows more"
    assert "failed" in (run / "logs" / "rank-00002.log").read_text()


@pytest.mark.slow
def test_a_machine_that_goes_ends_the_other(tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = machines(tmp_path, run, "--train-iters", "100000")
    with ended(*commands):
        wait_for(run / "metrics.jsonl", *commands)
        children = [pid for rank, pid in commands[1].ranks().items() if rank == 3]
        commands[1].process.kill()
        assert commands[0].wait(60) == 1
    assert "failed first: its process ended without a word" in commands[0].text
    assert gone(children)


@pytest.mark.slow
def test_a_wrong_file_on_one_machine_ends_the_other(tmp_path: Path) -> None:
    port = free_port()
    flags = [
        "--train-iters",
        "1",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "localhost",
        "--master-port",
        port,
    ]
    first = Command(tmp_path / "0.txt", *flags, "--node-rank", "0")
    with ended(first):
        while not _listens(int(port)):
            assert first.process.poll() is None, first.text
            time.sleep(0.1)
        second = Command(tmp_path / "1.txt", *flags, "--node-rank", "1", "--mm-data", "missing.json")
        with ended(second):
            assert second.wait() == 2
            assert first.wait(60) == 2
    assert "missing.json" in first.text
    assert "rank 1 (" in first.text


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- SLURM


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


def test_srun_with_a_task_for_each_rank(alone: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = srun(tmp_path, 2, 2, "--train-iters", "3", *_BATCH, "--save", run)
    with ended(*commands):
        assert [command.wait() for command in commands] == [0, 0], commands[0].text + commands[1].text
    assert losses(run) == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_srun_with_a_task_for_each_machine(alone: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = srun(tmp_path, 2, 2, "--train-iters", "3", *_BATCH, "--save", run, "--nproc-per-node", "2")
    with ended(*commands):
        assert [command.wait() for command in commands] == [0, 0], commands[0].text + commands[1].text
    assert losses(run) == pytest.approx(alone, rel=1e-5)
    assert len(list((run / "logs").glob("rank-*.log"))) == 4


def test_a_wrong_flag_of_one_task_ends_all(tmp_path: Path) -> None:
    """The others would wait for it until the time-out, ten minutes."""
    commands = srun(tmp_path, 2, 2, "--train-iters", "1", odd=("--micro-batchsize", "1"))
    with ended(*commands):
        assert [command.wait(120) for command in commands] == [2, 2]
    for command in commands:
        assert "--micro-batch-size" in command.text
        assert "Traceback" not in command.text
    assert "rank 1 (" in commands[0].text


# -- ranks that are started again


def test_a_killed_rank_is_started_again_and_the_run_is_the_same(tmp_path: Path) -> None:
    """Bit for bit, and from the run's own checkpoint, whatever --load named at first."""
    flags = [
        "--micro-batch-size",
        "1",
        "--global-batch-size",
        "2",
        "--nproc-per-node",
        "2",
        "--save-interval",
        "2",
    ]
    whole = Command(tmp_path / "whole.txt", *flags, "--train-iters", "6", "--save", tmp_path / "whole")
    with ended(whole):
        assert whole.wait() == 0, whole.text
    run = tmp_path / "run"
    broken = Command(
        tmp_path / "broken.txt", *flags, "--train-iters", "6", "--save", run, "--max-restarts", "2",
        program=("-c", _PAUSING, str(run / "checkpoints/iter_0000002/.complete"), str(tmp_path / "paused")),
    )  # fmt: skip
    with ended(broken):
        wait_for(tmp_path / "paused", broken)
        os.kill(broken.ranks()[1], signal.SIGKILL)
        (tmp_path / "paused").unlink()
        assert broken.wait() == 0, broken.text
    assert "rank 1 ended with exit code -9 (SIGKILL" in broken.text
    assert f"restart 1 of 2: the job goes on from {run / 'checkpoints/iter_0000002'}" in broken.text
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert losses(run) == losses(tmp_path / "whole")
    assert tensors(run, 6) == tensors(tmp_path / "whole", 6) != {}


#: `mm`, whose ranks write a note and wait at the first step after a checkpoint, once; a kill then always hits the middle.
_PAUSING = """
import os, sys, time
checkpoint, note = sys.argv[1:3]
sys.argv[1:] = sys.argv[3:]
if os.environ.get("RANK") is None:  # the command: its ranks run this program too
    import subprocess
    from mm_core.training import elastic
    made = elastic._spec
    def spec(flags, argv, handler):
        result = made(flags, argv, handler)
        result.args = ("-c", os.environ["PAUSING"], checkpoint, note, "train", *argv)
        return result
    elastic._spec = spec
    os.environ["PAUSING"] = open(f"/proc/{os.getpid()}/cmdline").read().split("\\0")[2]
else:
    from mm_core.training import trainer
    step = trainer.Trainer._train_step
    def pausing(self, *rest):
        if self.step == 3 and os.path.exists(checkpoint) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if self.rank == 1:
                open(note, "w").close()
                time.sleep(600)
        return step(self, *rest)
    trainer.Trainer._train_step = pausing
from mm_core.cli.main import run
run()
"""


def endless(folder: Path, run: Path, *flags: str | Path) -> Command:
    more = ["--train-iters", "100000", "--save", run, "--nproc-per-node", "2", "--micro-batch-size", "1"]
    return Command(folder / f"out-{len(list(folder.iterdir()))}.txt", *more, *flags)


@pytest.mark.slow
def test_a_users_mistake_is_not_tried_again(tmp_path: Path) -> None:
    run = tmp_path / "run"  # in use, which only the ranks find out
    holder = endless(tmp_path, run)
    with ended(holder):
        wait_for(run / "metrics.jsonl", holder)
        second = endless(tmp_path, run, "--max-restarts", "3")
        with ended(second):
            assert second.wait() == 2, second.text
    assert "another process is training into this folder" in second.text
    assert "restart 1" not in second.text


@pytest.mark.slow
def test_restarts_come_to_an_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = endless(tmp_path, run, "--max-restarts", "1", "--save-interval", "2")
    killed: set[int] = set()
    with ended(command):
        while command.process.poll() is None:
            pid = command.ranks().get(1)
            if pid is not None and len(killed) < 2 and (run / "metrics.jsonl").exists():
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.1)
    assert command.process.returncode == 1
    assert len(killed) == 2
    assert command.text.count("restart 1 of 1") == 1
    assert "restart 2" not in command.text


@pytest.mark.slow
def test_sigterm_to_an_elastic_job_saves_once_and_leaves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = endless(tmp_path, run, "--max-restarts", "3")
    with ended(command):
        wait_for(run / "metrics.jsonl", command)
        command.process.terminate()
        assert command.wait() == 143, command.text
    (saved,) = (run / "checkpoints").glob("iter_*")
    assert saved.name == f"iter_{metrics(run)[-1]['step']:07d}"
    assert "restart 1" not in command.text


@pytest.mark.slow
def test_ranks_die_with_their_agent(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = endless(tmp_path, run, "--max-restarts", "3")
    with ended(command):
        wait_for(run / "metrics.jsonl", command)
        ranks = command.ranks()
        assert sorted(ranks) == [0, 1]
        command.process.kill()
        command.process.wait()
        assert gone(ranks.values())


@pytest.mark.slow
def test_an_elastic_job_on_two_machines_loses_a_rank(tmp_path: Path) -> None:
    """Machines in any order, found by c10d; both start their ranks again."""
    run, port = tmp_path / "run", free_port()
    commands = [
        Command(
            tmp_path / f"machine-{node}.txt", *_BATCH, "--train-iters", "5", "--save", run, "--nnodes", "2",
            "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv-id", "test", "--max_restarts", "2",
            "--save-interval", "2",
            program=("-c", _PAUSING, str(run / "checkpoints/iter_0000002/.complete"), str(tmp_path / "paused")),
        )
        for node in range(2)
    ]  # fmt: skip
    with ended(*commands):
        wait_for(tmp_path / "paused", *commands)
        (pid,) = [pid for command in commands for rank, pid in command.ranks().items() if rank == 1]
        os.kill(pid, signal.SIGKILL)
        assert [command.wait() for command in commands] == [0, 0], commands[0].text + commands[1].text
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5]
    assert any("restart 1 of 2" in command.text for command in commands)
