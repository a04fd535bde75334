"""Several machines (each a command here) and SLURM (processes with its variables): real commands, real kills."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import losses
from tests.e2e.launched import BATCH, Command, ended, free_port, gone, listens, machines, srun, wait_for

pytestmark = pytest.mark.timeout(600)


# -- several machines


@pytest.mark.slow
def test_two_machines_give_the_losses_of_one_process(alone: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = machines(tmp_path, run, "--train-iters", "4")
    with ended(*commands):
        assert [command.wait() for command in commands] == [0, 0], commands[0].text + commands[1].text
    assert losses(run) == pytest.approx(alone, rel=1e-5)
    assert sorted(path.name for path in (run / "logs").glob("rank-*")) == [
        f"rank-{rank:05d}.log" for rank in range(4)
    ]


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
    flags = ["--train-iters", "1", "--nnodes", "2", "--nproc-per-node", "1"]
    flags += ["--master-addr", "localhost", "--master-port", port]
    first = Command(tmp_path / "0.txt", *flags, "--node-rank", "0")
    with ended(first):
        while not listens(int(port)):
            assert first.process.poll() is None, first.text
            time.sleep(0.1)
        second = Command(tmp_path / "1.txt", *flags, "--node-rank", "1", "--mm-data", "missing.json")
        with ended(second):
            assert second.wait() == 2
            assert first.wait(60) == 2
    assert "missing.json" in first.text
    assert "rank 1 (" in first.text


# -- SLURM


@pytest.mark.slow
def test_srun_with_a_task_for_each_machine(apart: tuple[Path, list[str]]) -> None:
    """Its numbers are those of one machine, see test_restarts.py."""
    run, (first, second) = apart
    assert len(losses(run)) == 4
    assert "step 4/4" in first
    assert second == "", "rank 0 speaks for the job"
    assert sorted(path.name for path in (run / "logs").glob("rank-*")) == ["rank-00000.log", "rank-00001.log"]


@pytest.mark.slow
def test_srun_with_a_task_for_each_rank(alone: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = srun(tmp_path, 2, 2, "--train-iters", "2", *BATCH, "--save", run)
    with ended(*commands):
        assert [command.wait() for command in commands] == [0, 0], commands[0].text + commands[1].text
    assert losses(run) == pytest.approx(alone[:2], rel=1e-5)


@pytest.mark.slow
def test_a_wrong_flag_of_one_task_ends_all(tmp_path: Path) -> None:
    """The others would wait for it until the time-out, ten minutes."""
    commands = srun(tmp_path, 2, 2, "--train-iters", "1", odd=("--micro-batchsize", "1"))
    with ended(*commands):
        assert [command.wait(120) for command in commands] == [2, 2]
    for command in commands:
        assert "--micro-batch-size" in command.text
        assert "Traceback" not in command.text
    assert "rank 1 (" in commands[0].text
