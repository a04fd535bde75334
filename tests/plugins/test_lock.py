"""The lock of real wheels that pip installed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.conftest import Environment

pytestmark = pytest.mark.timeout(300)


def plugin(environment: Environment, folder: Path, *arguments: str) -> tuple[int, Any]:
    """Run `mm plugin …` there and return its exit code and what it printed."""
    done = subprocess.run(
        [environment.python, "-I", "-m", "mm_core", "plugin", *arguments, "--format", "json"],
        cwd=folder, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_lock_of_one_environment_holds_in_another_until_a_file_changes(
    installed: Environment,
    make_environment: Callable[..., Environment],
    wheels: dict[str, Path],
    tmp_path: Path,
) -> None:
    code, written = plugin(installed, tmp_path, "lock")
    assert code == 0
    assert {entry["contents"]["of"] for entry in written["distributions"]} == {"RECORD"}
    assert {entry["name"] for entry in written["distributions"]} == set(wheels)
    other = make_environment(*wheels.values())
    assert plugin(other, tmp_path, "verify", "--files") == (
        0,
        {"lock": "mmzoo.lock", "ok": True, "drift": []},
    )
    (file,) = other.root.rglob("mm_plugin_haar/autoencoder.py")
    file.write_text(file.read_text() + "\n# patched on the spot\n")
    assert plugin(other, tmp_path, "verify")[0] == 0, "RECORD is as it was"
    code, found = plugin(other, tmp_path, "verify", "--files")
    assert code == 2
    (drift,) = found["drift"]
    assert drift["distribution"] == "mmzoo-plugin-haar"
    assert "mm_plugin_haar/autoencoder.py was changed after it was installed" in drift["message"]
    other.pip("uninstall", "-y", "mmzoo-plugin-haar")
    code, found = plugin(other, tmp_path, "verify")
    assert code == 2
    assert [drift["kind"] for drift in found["drift"]] == ["missing"]
