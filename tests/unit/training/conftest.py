"""Shared by the tests of training: commands in forked processes, and a tiny model of real parts."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
TINY = Path("examples/tiny/wan22-t2v")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MM_PARENT_PID", "MM_PLUGINS")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in _LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True)
class Ended:
    """How a command ended; `output` is stdout and stderr together."""

    code: int
    output: str


def _child(output: Path, arguments: list[str]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(ROOT)
    os.environ.update(COLUMNS="250", MM_DEVICE="cpu", OMP_NUM_THREADS="1")
    code = 99
    try:
        from mm_core.cli.main import main
        from mm_core.observe.console import console

        console.width = 250  # it read the variable when it was made, perhaps before the fork
        code = main(arguments)
    except BaseException:  # noqa: BLE001 - reported by its exit code and text, whatever it is
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the forked copy of the test runner has handlers of its own


@pytest.fixture
def mm(tmp_path: Path) -> Callable[..., Ended]:
    """Run `mm …` in a process that is forked from this one, which has imported everything."""
    import diffusers.models.transformers.transformer_wan
    import transformers.models.umt5.modeling_umt5

    import mm_core.training.session  # noqa: F401

    assert diffusers
    assert transformers
    number = iter(range(1000))

    def run(*arguments: str | Path) -> Ended:
        output = tmp_path / f"output-{next(number)}.txt"
        process = mp.get_context("fork").Process(target=_child, args=(output, [str(a) for a in arguments]))
        process.start()
        process.join(50)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail(f"mm {arguments} did not end: {output.read_text()}")
        assert process.exitcode is not None
        return Ended(process.exitcode, output.read_text())

    return run


@pytest.fixture
def train(mm: Callable[..., Ended]) -> Callable[..., Ended]:
    """Run `mm train` of the tiny example with batches of one; further flags are added."""

    def run(*flags: Any, model: Path = TINY / "model.json") -> Ended:
        files = [
            "--mm-model",
            model,
            "--mm-data",
            TINY / "data.json",
            "--fsdp2-config-path",
            TINY / "fsdp2.yaml",
        ]
        batch = ["--micro-batch-size", 1, "--global-batch-size", 1, "--num-workers", 0]
        return mm("train", *files, *batch, "--lr", "1e-3", "--seed", 7, *flags)

    return run
