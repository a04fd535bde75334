"""The commands as a user types them, from the repository root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = Path("examples/tiny/wan22-t2v")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


def run_mm(*arguments: str | Path, cwd: Path = ROOT, timeout: float = 480, **variables: str) -> Result:
    """Run `mm …` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mm_core", *map(str, arguments)],
        cwd=cwd, env={**ENVIRONMENT, **variables}, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def mm() -> Callable[..., Result]:
    return run_mm


@dataclass(frozen=True)
class Job:
    """The files of a tiny job, and the flags that name them."""

    model: Path = TINY / "model.json"
    data: Path = TINY / "data.json"
    tools: Path = TINY / "tools.json"
    fsdp2: Path = TINY / "fsdp2.yaml"

    def flags(self, *more: str | Path) -> list[str]:
        return [
            "--mm-model", str(self.model), "--mm-data", str(self.data), "--mm-tool", str(self.tools),
            "--fsdp2-config-path", str(self.fsdp2), "--lr", "1e-3", "--lr-decay-style", "constant", "--seed", "7",
            "--num-workers", "0", *map(str, more),
        ]  # fmt: skip


def edited(source: Path, target: Path, edit: Callable[[str], str]) -> Path:
    """A copy of a repository file with its text changed; the change must change something."""
    text = (ROOT / source).read_text(encoding="utf-8")
    changed = edit(text)
    assert changed != text, "the edit did not apply"
    target.write_text(changed, encoding="utf-8")
    return target


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run)]


@contextmanager
def started(run: Path, *flags: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A tiny training run in the background that took two steps already; it does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mm_core", "train", *Job().flags("--train-iters", "100000", "--save", run, *flags)],
        cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not ((run / "metrics.jsonl").exists() and len(metrics(run)) >= 2):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def train(
    job: Job, run: Path, *flags: str | Path, steps: int = 4, batch: Sequence[int] = (2, 4), **variables: str
) -> Result:
    """`mm train` of a tiny job into `run`."""
    micro, total = batch
    return run_mm(
        "train", *job.flags("--train-iters", str(steps), "--micro-batch-size", str(micro), "--global-batch-size", str(total)),
        "--save", run, *flags, **variables,
    )  # fmt: skip


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    run = tmp_path_factory.mktemp("many") / "alone"
    result = train(Job(), run, steps=4, batch=(1, 4), OMP_NUM_THREADS="1")
    assert result.code == 0, result.err
    return losses(run)


@pytest.fixture(scope="session")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The run of two machines with a rank each, which srun started, and what they printed."""
    from tests.e2e.launched import BATCH, ended, srun  # which needs this file

    folder = tmp_path_factory.mktemp("apart")
    run = folder / "run"
    commands = srun(folder, 2, 2, "--train-iters", "4", *BATCH, "--save", run, "--nproc-per-node", "1")
    with ended(*commands):
        assert [command.wait() for command in commands] == [0, 0], commands[0].text + commands[1].text
    return run, [command.text for command in commands]
