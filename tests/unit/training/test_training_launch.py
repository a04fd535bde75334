"""Starting ranks: what the children get, what remains afterwards, and what happens when one fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_core.config import TrainFlags
from mm_core.training.launch import LocalRanks, _free_port, check_launch, started_by_launcher
from mm_core.training.session import _job_token
from mm_registry.errors import UserError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is started instead of Python: it writes down its command line and variables."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"path = {str(tmp_path)!r} + '/rank-' + os.environ['RANK'] + '.json'\n"
        "with open(path, 'w') as file:\n"
        "    json.dump({'argv': sys.argv[1:], 'environment': dict(os.environ), 'parent': os.getppid()}, file)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("mm_core.training.launch.sys.executable", str(script))
    return tmp_path


def told(folder: Path, rank: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    return result


def flags(**values: Any) -> TrainFlags:
    return TrainFlags(**values)


# -- check_launch


def test_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not started_by_launcher()
    check_launch(flags(nproc_per_node=2))
    check_launch(flags())
    monkeypatch.setenv("RANK", "0")
    assert not started_by_launcher(), "a rank without a number of ranks is no launch"


def test_several_machines_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--nnodes 2: .*--master-addr"):
        check_launch(flags(nnodes=2))
    check_launch(flags(nnodes=2, master_addr="10.0.0.1"))
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    check_launch(flags(nnodes=2))
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match=r"--nnodes 2: .*--rdzv-endpoint"):
        check_launch(flags(nnodes=2, max_restarts=1))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(flags(nnodes=2))


def test_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert started_by_launcher()
    check_launch(flags())
    check_launch(flags(nproc_per_node=4))
    with pytest.raises(
        UserError, match=r"--nproc-per-node 2: .*4 processes on this machine; leave the flag out"
    ):
        check_launch(flags(nproc_per_node=2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_launch(flags(nproc_per_node=2))
    monkeypatch.setenv("MM_PARENT_PID", "1")  # a child of ours has its parent's flags
    check_launch(flags(nproc_per_node=7))


# -- the children


def test_what_children_get(stand_in: Path) -> None:
    argv = ["--mm-model", "a file.json", "--lr", "1e-3"]
    with LocalRanks(flags(nproc_per_node=3), argv):
        mine = dict(os.environ)
    assert (mine["RANK"], mine["LOCAL_RANK"], mine["WORLD_SIZE"], mine["LOCAL_WORLD_SIZE"]) == (
        "0",
        "0",
        "3",
        "3",
    )
    for rank in (1, 2):
        child = told(stand_in, rank)
        environment = child["environment"]
        assert child["argv"] == ["-m", "mm_core", "train", *argv]
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["MM_PARENT_PID"] == str(os.getpid()) == str(child["parent"])
        for name in (
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "OMP_NUM_THREADS",
            "PATH",
        ):
            assert environment[name] == mine[name]
    assert mine["MASTER_ADDR"] == "127.0.0.1"
    assert 0 < int(mine["MASTER_PORT"]) < 65536


def test_ranks_of_the_second_machine(stand_in: Path) -> None:
    job = flags(nproc_per_node=2, nnodes=2, node_rank=1, master_addr="10.0.0.1", master_port=29999)
    with LocalRanks(job, []):
        assert os.environ["RANK"] == "2"
        assert os.environ["WORLD_SIZE"] == "4"
    environment = told(stand_in, 3)["environment"]
    assert environment["LOCAL_RANK"] == "1"
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29999")


def test_several_machines_agree_on_a_port() -> None:
    with LocalRanks(flags(nnodes=2, master_addr="10.0.0.1"), []):
        assert os.environ["MASTER_PORT"] == "29500"


def test_nothing_remains_afterwards(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = stand_in / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("MASTER_PORT", "1")
    before, threads = dict(os.environ), torch.get_num_threads()
    descriptors = set(os.listdir("/proc/self/fd"))
    for count in (1, 2):
        with LocalRanks(flags(nproc_per_node=count), []):
            assert started_by_launcher()
        assert dict(os.environ) == before
    assert torch.get_num_threads() == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert not list(temporary.iterdir())


def test_the_machines_cores_are_shared_out(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    with LocalRanks(flags(nproc_per_node=2), []):
        assert torch.get_num_threads() == 3, "rank 0 imported torch before the variable was set"
    assert told(stand_in, 1)["environment"]["OMP_NUM_THREADS"] == "3"
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with LocalRanks(flags(nproc_per_node=2), []):
        assert torch.get_num_threads() == 1, "who sets the variable decides"
    assert told(stand_in, 1)["environment"]["OMP_NUM_THREADS"] == "5"


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", _free_port()))


# -- failures, each in a process of its own, for they end it


def parent(tmp_path: Path, child: str, inside: str, **flags: Any) -> subprocess.CompletedProcess[str]:
    """Run a rank 0 that does `inside` while its one child runs `child`."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{child}\n")
    script.chmod(0o755)
    code = textwrap.dedent(
        """
        import os, signal, sys, time
        from mm_core.config import TrainFlags
        from mm_core.training import launch
        real, sys.executable = sys.executable, sys.argv[1]
        with launch.LocalRanks(TrainFlags(nproc_per_node=2, **{flags}), []) as ranks:
            {inside}
        print("left in order")
        """
    ).format(inside=inside, flags=flags)
    return subprocess.run(
        [sys.executable, "-c", code, str(script)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_failing_child_ends_the_job(tmp_path: Path) -> None:
    done = parent(tmp_path, "print('the reason'); sys.exit(1)", "time.sleep(50)")
    assert done.returncode == 1
    assert "rank 1 ended with exit code 1" in done.stderr
    assert "the reason" in done.stderr


def test_a_killed_child_ends_the_job(tmp_path: Path) -> None:
    done = parent(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(50)")
    assert done.returncode == 1
    assert "rank 1 ended with exit code -9" in done.stderr


def test_what_a_child_printed_that_died_early_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = "print('x' * 5000); print('the reason', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = parent(tmp_path, child, "time.sleep(50)", save=str(run))
    assert "(SIGKILL: somebody killed it, most likely the system, out of memory" in done.stderr
    assert f"(whole log: {run / 'logs' / 'rank-00001.log'})" in done.stderr
    assert (run / "logs" / "rank-00001.log").read_text() == "x" * 5000 + "\nthe reason\n"
    (tmp_path / "second").mkdir()
    mistaken = parent(
        tmp_path / "second", "print('mine alone'); sys.exit(2)", "time.sleep(50)", save=str(tmp_path / "none")
    )
    assert "mine alone" in mistaken.stderr
    assert not (tmp_path / "none").exists(), "a mistake is told, and leaves nothing"


def test_a_child_that_fails_last_is_not_missed(tmp_path: Path) -> None:
    done = parent(tmp_path, "time.sleep(1); sys.exit(1)", "pass")
    assert done.returncode == 1
    assert "left in order" not in done.stdout


def test_a_mistake_that_all_ranks_meet_is_told_by_rank_0(tmp_path: Path) -> None:
    done = parent(tmp_path, "sys.exit(2)", "time.sleep(1); raise SystemExit(2)")
    assert done.returncode == 2
    assert done.stderr == ""
    done = parent(tmp_path, "print('mine alone'); sys.exit(2)", "time.sleep(50)")
    assert done.returncode == 2
    assert "mine alone" in done.stderr


def test_a_child_that_stopped_as_asked_does_not_cut_rank_0_short(tmp_path: Path) -> None:
    """After SIGTERM every rank leaves with 143; rank 0 may have the last lines to write."""
    done = parent(tmp_path, "sys.exit(143)", "time.sleep(1)")
    assert done.returncode == 0
    assert done.stdout == "left in order\n"
    assert done.stderr == ""


def test_ctrl_c_reaches_all_ranks_and_is_no_failure_of_one(tmp_path: Path) -> None:
    done = parent(tmp_path, "sys.exit(130)", "time.sleep(1); raise SystemExit(130)")
    assert done.returncode == 130
    assert done.stderr == ""


def test_an_error_of_rank_0_ends_the_children(tmp_path: Path) -> None:
    for error in ("RuntimeError('boom')", "SystemExit(1)"):
        started = time.monotonic()
        done = parent(tmp_path, "time.sleep(50)", f"raise {error}")
        assert done.returncode == 1
        assert time.monotonic() - started < 30


def test_sigterm_is_passed_on(tmp_path: Path) -> None:
    note = tmp_path / "note"
    child = (
        f"def stop(*_):\n    open({str(note)!r}, 'w').write('stopped'); sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, stop); open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(50)"
    )
    inside = (
        f'exec("while not os.path.exists({str(tmp_path / "ready")!r}): time.sleep(0.05)"); ranks.terminate()'
    )
    done = parent(tmp_path, child, inside)
    assert done.returncode == 0, done.stderr
    assert note.read_text() == "stopped"


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import time; from mm_core.training.launch import die_with_parent; die_with_parent()\n"
        "print('on', flush=True); time.sleep(50)"
    )
    code = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, "
        "env={**os.environ, 'MM_PARENT_PID': str(os.getpid())})\n"
        "child.stdout.readline(); print(child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while _alive(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- which job a rank belongs to, that may be started again


def test_the_job_of_a_rank_that_torchrun_may_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a folder of the same job is continued; torchrun calls each job "none" that has no --rdzv-id."""
    for name in ("MM_JOB", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert _job_token() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert _job_token() is None, "its ranks are not started again"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert _job_token() is None, "nothing tells it from other jobs"
    for attempt in (0, 1):
        file = f"/tmp/torchelastic_x/none_abc/attempt_{attempt}/0/error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
        assert _job_token() == "none_abc"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "wan-1")
    assert _job_token() == "wan-1"
    monkeypatch.setenv("MM_JOB", "ours")
    assert _job_token() == "ours"
