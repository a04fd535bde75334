"""The line that launch scripts of MindSpeed-MM cut step times out of."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from observe_helpers import context, record

from mm_core.observe.step_log import StepLog


def test_the_fifth_field_is_the_step_time() -> None:
    stream = io.StringIO()
    log = StepLog(4, stream)
    log.on_step_end(context(), record(3, seconds=0.25))
    (line,) = stream.getvalue().splitlines()
    assert line.split(":")[4].split("|")[0].strip() == "250.0"
    assert "iteration        3/      10 |" in line
    assert "consumed samples:           12 |" in line
    assert (
        "learning rate: 1.000000E-03 | global batch size:     4 | loss: 5.000000E-01 | grad norm: 1.250 |"
        in line
    )
    assert "tokens per sample: 250.0 |" in line


def test_a_line_has_the_mean_of_its_steps() -> None:
    stream = io.StringIO()
    log = StepLog(4, stream)
    for step, seconds in enumerate((1.0, 2.0, 5.0, 6.0), 1):
        log.on_step_end(context(interval=2), record(step, seconds=seconds))
    times = [float(line.split(":")[4].split("|")[0]) for line in stream.getvalue().splitlines()]
    assert times == [1500.0, 5500.0]


def test_only_rank_0_writes_and_only_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    StepLog(4).on_step_end(context(), record(1))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    StepLog(4).on_step_end(context(rank=1), record(1))
    assert capsys.readouterr().out == ""
    StepLog(4).on_step_end(context(), record(1))
    assert "elapsed time per iteration" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    StepLog(4).on_step_end(context(), record(1))
    assert capsys.readouterr().out == "", "a terminal has the progress bar"


def test_a_reader_that_went_away_does_not_stop_training(caplog: pytest.LogCaptureFixture) -> None:
    stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 - closing it fails, as writing does
    log = StepLog(4, stream)
    with caplog.at_level(logging.WARNING):
        log.on_step_end(context(), record(1))
        log.on_step_end(context(), record(2))
    assert len(caplog.records) == 1
    with pytest.raises(OSError, match="No space"):
        stream.close()
