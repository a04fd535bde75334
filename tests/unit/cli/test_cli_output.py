"""`mm list` as a process: what it imports, and what it says when its output cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mm_core
import mm_registry


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["list"], ["list", "--format", "json", "--group", "all"], ["--help"]])
def test_full_disk_is_one_sentence(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "mm_core", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "mm: cannot write output: No space left on device"
    assert "Traceback" not in run.stderr


def test_list_imports_nothing_slow() -> None:
    # Without `site`: it may import anything for the editable installs of a developer's environment.
    ours = [str(Path(package.__file__ or "").parents[1]) for package in (mm_core, mm_registry)]
    program = (
        f"import sys; sys.path[:0] = {[*ours, *sys.path]!r}\n"
        "from mm_core.cli.main import main\n"
        "code = main(['list', '--format', 'json'])\n"
        "print(*sorted(sys.modules), sep='\\n', file=sys.stderr)\n"
        "raise SystemExit(code)\n"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    modules = {name.strip().partition(".")[0] for name in run.stderr.splitlines()}
    assert "mm_registry" in modules
    slow = {"torch", "numpy", "pydantic", "yaml", "email", "http", "ssl", "urllib", "zipfile", "packaging"}
    slow |= {
        "importlib_metadata",
        "pluggy",
        "tomllib",
        "tomlkit",
        "traceback",
        "hashlib",
        "difflib",
        "select",
        "dataclasses",
    }
    assert not slow & modules
    assert not [name for name in modules if name.startswith("mm_plugin")]


def test_without_standard_output_nothing_fails() -> None:
    command = f'exec "{sys.executable}" -m mm_core list >&-'
    run = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (run.returncode, "Traceback" in run.stderr) == (0, False)


@pytest.mark.parametrize(
    "arguments", [["list"], ["doctor"], ["show", "evil"], ["plugin", "explain", "evil"], ["show", "none"]]
)
def test_a_terminal_does_not_obey_metadata(tmp_path: Path, arguments: list[str]) -> None:
    info = tmp_path / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ev\x1b[31mil\nVersion: 1.0\x1b]0;you\x07\n")
    (info / "entry_points.txt").write_text("[mm_core.ae_models]\nevil = a.b:C\nother = a:\x1b[2JC\n")
    run = subprocess.run(
        [sys.executable, "-m", "mm_core", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    said = run.stdout + run.stderr
    assert "\\x1b[" in said
    assert not [sign for sign in said if sign != "\n" and ord(sign) < 32]


@pytest.mark.parametrize("only", ["", ",", "no-such-check-at-all-anywhere"])
def test_checks_that_are_none_are_refused_in_short(only: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mm_core", "plugin", "check", "mmzoo-plugin-wan22", f"--only={only}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert "docs/conformance.md" in run.stderr
    assert len(run.stderr) < 300
