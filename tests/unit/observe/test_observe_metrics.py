"""`metrics.jsonl` and TensorBoard, read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from observe_helpers import context, record

from mm_core.observe.callback import BaseCallback
from mm_core.observe.metrics import MetricsFile, TensorBoard
from mm_registry.errors import UserError


def write(path: Path, steps: range, *, rank: int = 0) -> None:
    callback, run = MetricsFile(path), context(rank, first=steps.start - 1)
    callback.on_train_start(run)
    for step in steps:
        callback.on_step_end(run, record(step, extra={"recall": step / 10}))
    callback.on_train_end(run)


def test_one_object_a_step(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", range(1, 3))
    write(tmp_path / "metrics.jsonl", range(3, 4))  # a resumed run appends
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert records[1] == {
        "step": 2, "loss": 0.5, "grad_norm": 1.25, "lr": 1e-3, "seconds": 0.25, "samples_per_second": 16.0,
        "tokens_per_second": 4000.0, "memory_bytes": 3 * 2**30, "consumed_samples": 8, "recall": 0.2,
    }  # fmt: skip


def test_rank_0_alone_writes(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", range(1, 3), rank=1)
    assert not list(tmp_path.iterdir())


def test_a_line_is_there_as_soon_as_the_step_is_over(tmp_path: Path) -> None:
    callback = MetricsFile(tmp_path / "metrics.jsonl")
    callback.on_train_start(context())
    callback.on_step_end(context(), record(1))
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n"), "a killed run keeps what it reported"
    callback.on_train_end(context())
    callback.on_train_end(context())


def test_a_number_that_is_none_keeps_the_line_json(tmp_path: Path) -> None:
    callback = MetricsFile(tmp_path / "metrics.jsonl")
    callback.on_train_start(context())
    callback.on_step_end(context(), record(1, extra={"a": math.nan, "b": -math.inf, "c": 2.0}))
    callback.on_train_end(context())

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=refuse)
    assert (values["a"], values["b"], values["c"]) == (None, None, 2.0)


@pytest.mark.parametrize("name", ["loss", "step", "extra"])
def test_a_tasks_metric_cannot_hide_the_loops(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        record(1, extra={name: 0.0})


def scalars(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def log(folder: Path, steps: range, loss: float) -> None:
    callback, run = TensorBoard(folder), context(first=steps.start - 1)
    callback.on_train_start(run)
    for step in steps:
        callback.on_step_end(run, record(step, loss=loss, extra={"recall": 0.5}))
    callback.on_train_end(run)


def test_tensorboard_has_every_number_of_every_step(tmp_path: Path) -> None:
    log(tmp_path, range(1, 6), 0.25)
    assert scalars(tmp_path, "train/loss") == dict.fromkeys(range(1, 6), 0.25)
    assert scalars(tmp_path, "train/recall") == dict.fromkeys(range(1, 6), 0.5)
    for name in ("lr", "grad_norm", "seconds", "samples_per_second", "memory_bytes"):
        assert len(scalars(tmp_path, f"train/{name}")) == 5


def test_a_resumed_run_replaces_the_steps_that_were_lost(tmp_path: Path) -> None:
    log(tmp_path, range(1, 8), 0.25)  # killed after step 7, its checkpoint is of step 4
    log(tmp_path, range(5, 7), 0.75)
    assert scalars(tmp_path, "train/loss") == {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25, 5: 0.75, 6: 0.75}


def test_other_ranks_write_no_events(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path / "board")
    callback.on_train_start(context(1))
    callback.on_step_end(context(1), record(1))
    callback.on_train_end(context(1))
    assert not (tmp_path / "board").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--tensorboard-dir"):
        TensorBoard(tmp_path / "file" / "board").on_train_start(context())


def test_a_callback_may_leave_methods_out() -> None:
    callback = BaseCallback()
    callback.on_train_start(context())
    callback.on_step_start(context(), 1)
    callback.on_step_end(context(), record(1))
    callback.on_train_end(context())
