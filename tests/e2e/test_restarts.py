"""Ranks that die and are started again, by `mm train` and by torchrun: real commands, real kills."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.conftest import losses, metrics
from tests.e2e.launched import BATCH, Command, ended, free_port, gone, listens, tensors, wait_for

pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_is_the_same(
    apart: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Bit for bit that of two ranks on two machines, which nobody disturbed."""
    whole, run = apart[0], tmp_path / "run"
    broken = Command(
        tmp_path / "broken.txt", *BATCH, "--train-iters", "4", "--save", run, "--save-interval", "2",
        "--nproc-per-node", "2", "--max-restarts", "2",
        program=("-c", _PAUSING, str(run / "checkpoints/iter_0000002/.complete"), str(tmp_path / "paused")),
    )  # fmt: skip
    with ended(broken):
        wait_for(tmp_path / "paused", broken)
        os.kill(broken.ranks()[1], signal.SIGKILL)
        assert broken.wait() == 0, broken.text
    assert "failed first: its process ended without a word" in broken.text, "rank 0's words"
    assert "rank 1 ended with exit code -9 (SIGKILL" in broken.text, "the agent's"
    assert "Traceback" not in broken.text, "what rank 0 met is in its log"
    assert f"restart 1 of 2: the job goes on from {run / 'checkpoints/iter_0000002'}" in broken.text
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]
    assert losses(run) == losses(whole)
    assert tensors(run, 4) == tensors(whole, 4) != {}
    assert {path.name for path in (run / "logs").glob("rank-*")} == {"rank-00000.log", "rank-00001.log"}


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
    more: list[str | Path] = [
        "--train-iters",
        "100000",
        "--save",
        run,
        "--nproc-per-node",
        "2",
        "--micro-batch-size",
        "1",
    ]
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
            tmp_path / f"machine-{node}.txt", *BATCH, "--train-iters", "5", "--save", run, "--nnodes", "2",
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


@pytest.mark.slow
def test_a_job_goes_on_with_the_machines_that_are_left(alone: list[float], tmp_path: Path) -> None:
    """MIN:MAX: one of two machines goes for good; one rank does the work of two."""
    run, port = tmp_path / "run", free_port()
    commands: list[Command] = []
    with ended(later=commands):
        for node in range(2):  # the first one keeps the place where they meet, and stays
            commands.append(
                Command(
                    tmp_path / f"machine-{node}.txt", *BATCH, "--train-iters", "4", "--save", run, "--nnodes", "1:2",
                    "--nproc-per-node", "1", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test",
                    "--rdzv-conf", "last_call_timeout=60", "--max-restarts", "3", "--save-interval", "2",
                    program=("-c", _PAUSING, str(run / "checkpoints/iter_0000002/.complete"), str(tmp_path / "paused")),
                )
            )  # fmt: skip
            while node == 0 and not listens(int(port)):
                assert commands[0].process.poll() is None, commands[0].text
                time.sleep(0.1)
        wait_for(tmp_path / "paused", *commands)
        commands[1].process.kill()
        assert commands[0].wait(400) == 0, commands[0].text
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]
    assert losses(run) == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_plain_torchrun_starts_ranks_again(apart: tuple[Path, list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = torchrun(
        tmp_path, "--max_restarts", "1", "--nproc_per_node", "2",
        job=[*BATCH, "--train-iters", "4", "--save", run, "--save-interval", "2"],
        kill=str(run / "checkpoints/iter_0000002/.complete"),
    )  # fmt: skip
    with ended(command):
        assert command.wait() == 0, command.text
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]
    assert losses(run) == losses(apart[0])
    # The folder of another job is not continued, however often torchrun tries.
    again = torchrun(
        tmp_path, "--max_restarts", "1", "--nproc_per_node", "1", job=["--train-iters", "6", "--save", run]
    )
    with ended(again):
        assert again.wait() == 1
    assert "already holds the checkpoints of a run" in again.text
    assert len(metrics(run)) == 4


def torchrun(folder: Path, *flags: str, job: Sequence[str | Path], kill: str = "") -> Command:
    """torchrun of a rank that kills itself as number 1 at the step after the checkpoint `kill`, the first time."""
    script = folder / "rank.py"
    script.write_text(_DYING)
    return Command(
        folder / f"torchrun-{len(list(folder.iterdir()))}.txt", *job, KILL=kill,
        program=("-m", "torch.distributed.run", "--master_port", free_port(), *flags, str(script)),
    )  # fmt: skip


_DYING = """
import os, signal
from mm_core.training import trainer
step = trainer.Trainer._train_step
def dying(self, *rest):
    if self.rank == 1 and self.step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.path.exists(os.environ["KILL"]):
            os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *rest)
trainer.Trainer._train_step = dying
from mm_core.cli.main import run
run()
"""
