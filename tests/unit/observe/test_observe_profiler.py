"""`profile.static_param`: which steps and ranks are recorded, and what is said when none is."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from observe_helpers import context, record

from mm_core.config import ToolsConfig
from mm_core.observe.profiler import StaticProfile
from mm_registry.errors import UserError

pytestmark = pytest.mark.timeout(120)


def run(
    folder: Path,
    start: int,
    end: int,
    *,
    ranks: list[int] | None = None,
    rank: int = 0,
    first: int = 0,
    last: int = 6,
    **more: Any,
) -> None:
    """Steps of a matrix product of a size of its own each, so that a trace tells which are in it."""
    settings = {"start_step": start, "end_step": end, "save_path": str(folder), "record_shapes": True, **more}
    tools = ToolsConfig.model_validate(
        {"profile": {"enable": True, "ranks": ranks or [0], "static_param": settings}}
    )
    callback, about = StaticProfile(tools), context(rank, first=first, last=last)
    callback.on_train_start(about)
    try:
        for step in range(first + 1, last + 1):
            callback.on_step_start(about, step)
            torch.ones(step, 3) @ torch.ones(3, 2)
            callback.on_step_end(about, record(step))
    finally:
        callback.on_train_end(about)


def profiled(folder: Path) -> list[int]:
    """The steps in the one trace of a folder."""
    (trace,) = folder.glob("*.json")
    events = json.loads(trace.read_text())["traceEvents"]
    shapes = [e["args"]["Input Dims"] for e in events if e.get("name") == "aten::mm"]
    return sorted(shape[0][0] for shape in shapes)


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(1, 2, [1]), (2, 4, [2, 3]), (5, 7, [5, 6]), (5, 100, [5, 6]), (1, 7, [1, 2, 3, 4, 5, 6])],
)
def test_the_window(tmp_path: Path, start: int, end: int, steps: list[int]) -> None:
    run(tmp_path / "deep" / "er", start, end)
    assert profiled(tmp_path / "deep" / "er") == steps
    (trace,) = (tmp_path / "deep" / "er").iterdir()
    assert trace.name == f"rank-00000.steps-{steps[0]}-{steps[-1] + 1}.pt.trace.json"


def test_a_run_that_resumes_within_the_window_records_the_rest(tmp_path: Path) -> None:
    run(tmp_path, 2, 6, first=3)
    assert profiled(tmp_path) == [4, 5]


@pytest.mark.parametrize(
    ("ranks", "rank", "wanted"), [([0], 1, False), ([1], 1, True), ([-1], 1, True), ([0, 2], 2, True)]
)
def test_the_ranks(
    tmp_path: Path, ranks: list[int], rank: int, wanted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "profile", 2, 3, ranks=ranks, rank=rank)
    assert [p.name for p in (tmp_path / "profile").glob("*")] == (
        [f"rank-{rank:05d}.steps-2-3.pt.trace.json"] if wanted else []
    )
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("first", "last", "took"), [(0, 6, "steps 1 to 6"), (30, 33, "steps 31 to 33"), (6, 6, "none")]
)
def test_a_run_that_never_reaches_the_window_says_so(
    tmp_path: Path, first: int, last: int, took: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, 10, 12, first=first, last=last)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "nothing was profiled on rank 0" in warning
    assert "steps 10 to 11" in warning
    assert took in warning
    assert not list(tmp_path.glob("*.json"))


def test_a_run_that_fails_within_the_window_leaves_its_trace(tmp_path: Path) -> None:
    tools = ToolsConfig.model_validate(
        {
            "profile": {
                "enable": True,
                "static_param": {"start_step": 1, "end_step": 9, "save_path": str(tmp_path)},
            }
        }
    )
    callback = StaticProfile(tools)
    callback.on_train_start(context())
    callback.on_step_start(context(), 1)
    callback.on_train_end(context())
    callback.on_train_end(context())
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_folder_that_cannot_be_made_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"profile\.static_param\.save_path: .*file"):
        run(tmp_path / "file" / "profile", 1, 2)
    run(tmp_path / "file" / "profile", 1, 2, rank=1)  # a rank that does not profile needs no folder


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator's activity can be recorded")
def test_nothing_to_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with_cpu"):
        run(tmp_path, 1, 2, with_cpu=False)


def test_stacks_and_memory(tmp_path: Path) -> None:
    run(tmp_path, 1, 2, with_stack=True, with_memory=True)
    (trace,) = tmp_path.glob("*.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "[memory]" in names
