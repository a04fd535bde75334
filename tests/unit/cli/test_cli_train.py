"""`mm train` before anything is built: help, and the order of checks."""

from __future__ import annotations

from typing import Any

import pytest

from mm_core.cli.main import main


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--micro-batch-size", "1", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: mm train")
    assert "--global-batch-size" in out


def test_all_wrong_flags_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--mirco-batch-size", "1", "--lr", "fast"]) == 2
    err = capsys.readouterr().err
    assert "--micro-batch-size" in err
    assert "--lr" in err


def test_a_right_job_goes_to_the_session_with_its_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import mm_core.cli.train as command
    import mm_core.training.session as session

    seen: list[Any] = []
    monkeypatch.setattr(command, "load_training_job", lambda flags: ("job", flags.train_iters))

    def train(job: Any, argv: Any, plugins: Any) -> int:
        seen.append((job, argv, plugins))
        return 143

    monkeypatch.setattr(session, "train", train)
    assert main(["train", "--train-iters", "3"]) == 143
    assert seen == [(("job", 3), ["--train-iters", "3"], None)]
