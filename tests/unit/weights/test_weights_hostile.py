"""Weights adapters that misbehave, and places that cannot hold a folder: one clear sentence, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mm_core.weights import WeightsError, load_hf_folder, save_hf_folder
from mm_core.weights.adapter import problems_of


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise self


def raising(error: BaseException) -> Callable[..., Any]:
    def method(*arguments: object) -> Any:
        raise error

    return method


class Adapter:
    """One to one, unless told otherwise."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        vars(self).update(methods)

    def to_module(self, key: str) -> str:
        return key

    def to_folder(self, key: str) -> str:
        return key

    def config_to_folder(self, fields: Any) -> dict[str, Any]:
        return {}

    def config_problems(self, config: Any, fields: Any) -> list[str]:
        return []


@pytest.mark.parametrize(
    "to_folder",
    [
        raising(UnspeakableError()),
        raising(SystemExit(0)),
        lambda key: "__metadata__",
        lambda key: "\ud800" + key,
        lambda key: "\n" + key,
        lambda key: None,
    ],
)
def test_an_adapter_that_misbehaves(to_folder: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"Adapter\.to_folder\('weight'\) "):
        save_hf_folder(nn.Linear(2, 2), tmp_path / "out", Adapter(to_folder=to_folder))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "config_problems",
    [raising(KeyError("heads")), raising(SystemExit(0)), lambda *_: "text", lambda *_: None],
)
def test_an_adapter_that_cannot_compare(config_problems: Callable[..., Any]) -> None:
    with pytest.raises(WeightsError, match=r"Adapter\.config_problems "):
        problems_of(Adapter(config_problems=config_problems), {}, {})


@pytest.mark.parametrize("folder", [".", "/", "..", "file/out", "x" * 300])
def test_a_place_that_cannot_hold_a_folder(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="name another folder"):
        save_hf_folder(nn.Linear(2, 2), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    save_hf_folder(nn.Linear(2, 2), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    load_hf_folder(nn.Linear(2, 2), tmp_path / "disk")


def test_killed_while_writing(tmp_path: Path) -> None:
    """There is no folder then, and the next attempt takes away what was left."""
    program = (
        "import os, signal\n"
        "from torch import nn\n"
        "from mm_core.weights import hf_save, hf_writer\n"
        "hf_writer.sync_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"hf_save.save_hf_folder(nn.Linear(2, 2), {str(tmp_path / 'out')!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", program], timeout=120, check=False)
    assert run.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".tmp-out"]
    save_hf_folder(nn.Linear(2, 2), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_an_index_that_cannot_be_parsed_or_is_a_pipe(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[" * 100_000)
    with pytest.raises(WeightsError, match="is no safetensors index"):
        load_hf_folder(nn.Linear(2, 2), tmp_path)
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(WeightsError, match="is no regular file"):
        load_hf_folder(nn.Linear(2, 2), tmp_path)
