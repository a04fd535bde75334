"""The run's folder: one writer, nothing overwritten, no record lost."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from mm_core.training.run_folder import RunFolder, write_json
from mm_registry.errors import UserError


def checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    if complete:
        (folder / ".complete").write_text("{}")
    return folder


def opened(path: Path, continued: Path | None = None) -> RunFolder:
    run = RunFolder(path)
    run.open(continued=continued)
    return run


# -- who may write


def test_it_is_made_with_its_parents(tmp_path: Path) -> None:
    run = opened(tmp_path / "a" / "b")
    assert run.logs.is_dir()
    run.close()


def test_another_process_holds_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mm_core.training.run_folder import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1])); run.open(); print('open', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "open\n"
            with pytest.raises(UserError, match="another process is training into this folder"):
                opened(tmp_path / "run")
        finally:
            holder.kill()
    opened(tmp_path / "run").close()  # a killed process holds nothing


def opened_elsewhere(path: Path) -> str:
    """What another process that opens the folder is told."""
    code = (
        "import sys; from pathlib import Path; from mm_core.training.run_folder import RunFolder; "
        "RunFolder(Path(sys.argv[1])).open()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stderr


def test_closing_lets_another_process_in(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert "another process is training into this folder" in opened_elsewhere(tmp_path)
    first.close()
    first.close()
    assert opened_elsewhere(tmp_path) == ""


def test_a_process_that_was_forked_does_not_keep_the_lock(tmp_path: Path) -> None:
    first = opened(tmp_path)
    ends = multiprocessing.get_context("fork").Event()
    worker = multiprocessing.get_context("fork").Process(
        target=ends.wait
    )  # as a loader's worker outlives a killed rank
    worker.start()
    first.close()
    try:
        assert opened_elsewhere(tmp_path) == ""
    finally:
        ends.set()
        worker.join()


def test_a_refused_folder_is_not_left_locked(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    refused = RunFolder(tmp_path)
    with pytest.raises(UserError):
        refused.open()
    opened(tmp_path, tmp_path / "checkpoints" / "iter_0000005").close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"--save .*file.* cannot be written \(.+\); name another folder"):
            opened(path)
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        opened(tmp_path / "run")


def test_without_locks_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", flock)
    with pytest.raises(UserError, match="cannot be locked \\(No locks available\\)"):
        opened(tmp_path)


# -- what must not be overwritten


def test_complete_checkpoints_are_refused_without_load(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    with pytest.raises(UserError, match=rf"add `--load {tmp_path}` to continue it"):
        opened(tmp_path)


def test_a_crashed_run_without_a_complete_checkpoint_starts_again_in_place(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5, complete=False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    run = opened(tmp_path)
    run.cut_metrics(0)
    assert run.metrics.read_text() == ""
    run.close()


def test_continuing_the_newest_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    opened(tmp_path, checkpoint(tmp_path, 10)).close()


def test_continuing_an_older_one_is_refused_before_any_step(tmp_path: Path) -> None:
    older = checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 15, complete=False)
    with pytest.raises(UserError, match=r"later checkpoints \(iter_0000010\)"):
        opened(tmp_path, older)


def test_half_written_checkpoints_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path, 5)
    half = tmp_path / "checkpoints" / ".tmp-iter_0000010"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"0")
    (tmp_path / ".tmp-mine").mkdir()
    run = RunFolder(tmp_path)
    assert run.open(continued=kept) == [".tmp-iter_0000010"]
    assert not half.exists()
    assert (tmp_path / ".tmp-mine").exists()
    assert kept.exists()
    run.close()


# -- metrics


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def records(*steps: int) -> list[str]:
    return [f'{{"step": {step}, "loss": 0.5}}\n' for step in steps]


def continued(tmp_path: Path, metrics: str | bytes, step: int = 3) -> RunFolder:
    folder = checkpoint(tmp_path, step)
    data = metrics.encode() if isinstance(metrics, str) else metrics
    (tmp_path / "metrics.jsonl").write_bytes(data)
    return opened(tmp_path, folder)


def test_later_records_are_moved_aside(tmp_path: Path) -> None:
    run = continued(tmp_path, "".join(records(1, 2, 3, 4, 5)))
    run.cut_metrics(3)
    assert lines(run.metrics) == records(1, 2, 3)
    assert lines(run.logs / "metrics-after-step-3.1.jsonl") == records(4, 5)
    run.metrics.write_text("".join(records(1, 2, 3, 4)))
    run.cut_metrics(3)
    assert lines(run.logs / "metrics-after-step-3.2.jsonl") == records(4)
    assert lines(run.logs / "metrics-after-step-3.1.jsonl") == records(4, 5), "what was put aside first stays"
    run.close()


def test_nothing_to_cut(tmp_path: Path) -> None:
    run = continued(tmp_path, "".join(records(1, 2, 3)))
    run.cut_metrics(3)
    assert lines(run.metrics) == records(1, 2, 3)
    assert not list(run.logs.iterdir())
    run.close()


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "\x00\x00\x00", "[1]", '{"loss": 1}', '{"step": null}'])
def test_a_torn_last_line_is_put_aside(tmp_path: Path, torn: str) -> None:
    run = continued(tmp_path, "".join(records(1, 2, 3)) + torn)
    run.cut_metrics(3)
    assert lines(run.metrics) == records(1, 2, 3)
    assert (run.logs / "metrics-after-step-3.1.jsonl").read_text() == torn + "\n"
    run.close()


def test_bytes_that_are_no_text_are_put_aside(tmp_path: Path) -> None:
    run = continued(tmp_path, "".join(records(1)).encode() + b"\xff\xfe")
    run.cut_metrics(3)
    assert lines(run.metrics) == records(1)
    run.close()


def test_a_record_without_its_line_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    run = continued(tmp_path, "".join(records(1, 2, 3)).rstrip("\n"))
    run.cut_metrics(3)
    with run.metrics.open("a") as file:
        file.write(records(4)[0])
    assert [json.loads(line)["step"] for line in lines(run.metrics)] == [1, 2, 3, 4]
    run.close()


def test_another_runs_records_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(records(1, 2, 3)))
    run = opened(tmp_path)  # a crashed run's folder, and a run that goes on from step 5 of elsewhere
    run.cut_metrics(5)
    assert lines(run.metrics) == []
    assert lines(run.logs / "metrics-after-step-0.1.jsonl") == records(1, 2, 3)
    run.close()


def test_no_metrics_yet(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.cut_metrics(3)
    assert not run.metrics.exists()
    run.close()


# -- write_json


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"caption": "有轨电车", "n": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"caption": "有轨电车", "n": 1}
    before = path.stat().st_ino
    write_json(path, {"n": 2})
    assert path.stat().st_ino != before, "a new file took the place of the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        write_json(path, {"n": object()})

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}


# -- ranks that were started again


def test_it_knows_the_job_that_wrote_last(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not run.belongs_to("a")
    run.open(job="a")
    run.close()
    assert run.belongs_to("a")
    assert not run.belongs_to("b")
    assert not run.belongs_to(None), "a job without restarts owns nothing"
    run.open()
    run.close()
    assert not run.belongs_to("a"), "another one wrote since"


def test_a_job_waits_for_its_own_ranks_of_before(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mm_core.training.run_folder import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1])); run.open(job=sys.argv[2]); print('open', flush=True); time.sleep(1)"
    )
    for job, waits in (("a", True), ("b", False)):
        command = [sys.executable, "-c", code, str(tmp_path / job), "a"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as before:
            assert before.stdout is not None
            assert before.stdout.readline() == "open\n"
            run = RunFolder(tmp_path / job)
            if waits:
                run.open(job=job)
                run.close()
            else:
                with pytest.raises(UserError, match="another process is training into this folder"):
                    run.open(job=job)
