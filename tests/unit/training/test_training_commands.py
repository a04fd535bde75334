"""`mm train` at the edges of a run: no folder, nothing left to do, another model, an older checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_core.cli.main import main  # noqa: F401 - imported before the processes are forked

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).resolve().parents[3]


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_without_save(train: Callable, tmp_path: Path) -> None:
    result = train("--train-iters", 2, "--tensorboard-dir", tmp_path / "board")
    assert result.code == 0, result.output
    assert "without --save nothing is kept" in result.output
    assert "step 2/2" in result.output
    assert len(list((tmp_path / "board").glob("events.out.tfevents.*"))) == 1, (
        "a flag that is given is not ignored"
    )


@pytest.mark.slow
def test_a_run_and_what_can_be_done_with_its_folder(train: Callable, tmp_path: Path) -> None:
    run = tmp_path / "run"

    # A save interval beyond the end: the last step is saved all the same.
    result = train("--train-iters", 2, "--save", run, "--save-interval", 50, "--lr-decay-iters", 8)
    assert result.code == 0, result.output
    assert checkpoints(run) == ["iter_0000002", "latest"]
    before = {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.parent.name != "logs"
    }

    # Nothing is left to do: said, and no failure.
    for iterations in (2, 1):
        result = train("--train-iters", iterations, "--save", run, "--load", run, "--lr-decay-iters", 8)
        assert result.code == 0, result.output
        assert (
            f"nothing is left to train: --train-iters is {iterations}, and the checkpoint is of step 2"
            in result.output
        )
        assert steps(run) == [1, 2]
        assert checkpoints(run) == ["iter_0000002", "latest"]

    # --exit-interval leaves at its multiple, saved once, also where --save-interval saves too.
    flags = ("--exit-interval", 4, "--save-interval", 2, "--lr-decay-iters", 8)
    result = train("--train-iters", 8, "--save", run, "--load", run, *flags)
    assert result.code == 0, result.output
    assert steps(run) == [1, 2, 3, 4]
    assert checkpoints(run) == ["iter_0000002", "iter_0000004", "latest"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "iter_0000004"

    # What would have to overwrite a checkpoint is refused before the first step, and changes nothing.
    refusals = {
        ("--load", run / "checkpoints" / "iter_0000002"): "later checkpoints (iter_0000004)",
        ("--load", run, "--finetune"): "already holds the checkpoints of a run",
        (): "already holds the checkpoints of a run",
    }
    for more, words in refusals.items():
        result = train("--train-iters", 4, "--save", run, "--lr-decay-iters", 8, *more)
        assert result.code == 2, result.output
        assert words in result.output
        assert "Traceback" not in result.output
        assert steps(run) == [1, 2, 3, 4]
        assert all(
            path.read_bytes() == data for path, data in before.items() if "checkpoints/iter" in str(path)
        )

    # An older checkpoint can be continued elsewhere, where the records begin after it.
    older = ("--load", run / "checkpoints" / "iter_0000002", "--lr-decay-iters", 8)
    result = train("--train-iters", 3, "--save", tmp_path / "fork", *older)
    assert result.code == 0, result.output
    assert steps(tmp_path / "fork") == [3]
    assert checkpoints(tmp_path / "fork") == ["iter_0000003", "latest"]

    # Another job: nothing is written before the user says that it is meant.
    text = (ROOT / "examples/tiny/wan22-t2v/model.json").read_text()
    other = tmp_path / "other.json"
    other.write_text(
        text.replace('"num_layers": 4', '"num_layers": 3').replace('"ffn_dim": 256', '"ffn_dim": 128')
    )
    flags = ("--train-iters", 6, "--save", tmp_path / "other", "--load", run)
    result = train(*flags, model=other)
    assert result.code == 2, result.output
    assert "model.predictor.num_layers: 4 → 3" in result.output
    assert "--lr-decay-iters (by default --train-iters): 8 → 6" in result.output
    assert not (tmp_path / "other").exists()
    result = train(*flags, "--accept-changes", model=other)
    assert result.code == 2, result.output
    assert "Traceback" not in result.output
    assert "does not fit the model" in result.output
    assert "blocks.3." in result.output
    assert "[256, 128] in the checkpoint, [128, 128] in the model" in result.output
    assert not (tmp_path / "other" / "checkpoints").exists()


@pytest.mark.slow
def test_a_crash_leaves_what_the_next_run_removes_and_says(train: Callable, tmp_path: Path) -> None:
    half = tmp_path / "run" / "checkpoints" / ".tmp-iter_0000001"
    half.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    result = train("--train-iters", 1, "--save", tmp_path / "run")
    assert result.code == 0, result.output
    assert not half.exists()
    assert "removed .tmp-iter_0000001, left by a run that was killed" in result.output
    assert steps(tmp_path / "run") == [1]
    assert '"loss": 9.0' in (tmp_path / "run" / "logs" / "metrics-after-step-0.1.jsonl").read_text()
    assert "without --save" not in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [("file/run", "cannot be written"), ("run", "name another folder with --tensorboard-dir")],
)
def test_folders_that_cannot_be_written(train: Callable, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").write_text("")
    result = train(
        "--train-iters", 1, "--save", tmp_path / name, "--tensorboard-dir", tmp_path / "file" / "board"
    )
    assert result.code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output
