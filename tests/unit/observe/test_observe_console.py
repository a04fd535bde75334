"""What a person reads: numbers with units, lines where there is no terminal, a bar where there is one, logs."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from observe_helpers import context, record
from rich.console import Console

from mm_core.observe import console as module
from mm_core.observe.console import ConsoleProgress, describe, human_bytes, human_count, setup_logging


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1023.99 * 1024, "1.0 MiB"), (2**20, "1.0 MiB"),
        (1.5 * 2**30, "1.5 GiB"), (2**40 - 1, "1.0 TiB"), (80 * 2**30, "80.0 GiB"), (3 * 2**40, "3.0 TiB"), (2**51, "2048.0 TiB"),
    ],
)  # fmt: skip
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"), (0.25, "0.25"), (999, "999"), (999.7, "1k"), (1000, "1k"), (1234, "1.23k"), (972_000, "972k"), (999_950, "1M"),
        (3.4e6, "3.4M"), (999_999_999, "1B"), (14.3e9, "14.3B"),
    ],
)  # fmt: skip
def test_counts(count: float, text: str) -> None:
    assert human_count(count) == text


def test_counts_never_fall_back_to_exponents() -> None:
    assert not [n for exponent in range(110) if "e" in (n := human_count(10 ** (exponent / 10)))]


def test_a_step_in_one_line() -> None:
    line = describe(record(3, extra={"recall": 0.12345}))
    assert (
        line
        == "loss 0.5000 · grad norm 1.250 · lr 1.00e-03 · 16.0 samples/s · 4k tokens/s · 3.0 GiB · recall 0.1235"
    )


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=file, force_terminal=False, width=60))
    return file


def steps(rank: int, seconds: float, *, first: int = 0, last: int = 10, interval: int = 1) -> None:
    callback, run = ConsoleProgress(), context(rank, first=first, last=last, interval=interval)
    callback.on_train_start(run)
    for step in range(first + 1, last + 1):
        callback.on_step_end(run, record(step, seconds=seconds))
    callback.on_train_end(run)


def shown(output: io.StringIO) -> list[int]:
    return [int(line.split()[1].partition("/")[0]) for line in output.getvalue().splitlines()]


def test_slow_steps_have_a_line_each(output: io.StringIO) -> None:
    steps(0, 1.5, first=2, last=6)
    assert shown(output) == [3, 4, 5, 6]
    assert output.getvalue().splitlines()[1].startswith("step 4/6 · loss 0.5000 · ")
    assert output.getvalue().splitlines()[1].endswith(" · ETA 3 s"), "no line is wrapped"


def test_fast_steps_have_a_line_a_second_the_first_and_the_last(output: io.StringIO) -> None:
    steps(0, 0.25, last=10)
    assert shown(output) == [1, 5, 9, 10]


def test_the_log_interval(output: io.StringIO) -> None:
    steps(0, 2.0, last=10, interval=4)
    assert shown(output) == [1, 4, 8, 10]


def test_other_ranks_are_silent(output: io.StringIO) -> None:
    steps(1, 2.0)
    assert output.getvalue() == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(
        module, "console", Console(file=file, force_terminal=True, width=250, color_system=None)
    )
    steps(0, 1.0, first=4, last=9)
    assert "9/9" in file.getvalue()
    assert "loss 0.5000" in file.getvalue()
    assert "ETA" in file.getvalue()


# -- logging


@pytest.fixture
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_root_logger")
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_a_file_and_rank_0_the_console(tmp_path: Path, output: io.StringIO, rank: int) -> None:
    setup_logging(rank, tmp_path)
    logging.getLogger("mm_core.somewhere").info("loaded [bold]%s[/bold]", "x")
    logging.getLogger("mm_core.somewhere").debug("too much")
    text = (tmp_path / f"rank-{rank:05d}.log").read_text()
    assert "INFO mm_core.somewhere: loaded [bold]x[/bold]" in text
    assert "too much" not in text
    assert ("[bold]x[/bold]" in output.getvalue()) is (rank == 0), "brackets are no markup"


@pytest.mark.usefixtures("_root_logger")
def test_setting_up_again_closes_what_was_there(tmp_path: Path, output: io.StringIO) -> None:
    setup_logging(0, tmp_path)
    (first,) = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    setup_logging(0)
    assert first.stream is None
    assert len(logging.getLogger().handlers) == 1
    setup_logging(1)
    logging.getLogger("mm_core").warning("nobody hears it")
    assert output.getvalue() == ""
