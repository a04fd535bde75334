"""The examples of registry/README.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mm_registry import GROUPS

README = (Path(__file__).resolve().parents[3] / "registry" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [0, 1])
def test_python_example_runs(number: int, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    run = subprocess.run(
        [sys.executable, "-I", "-c", blocks[number]], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert run.returncode == 0, run.stderr
    if number == 0:
        last = run.stdout.splitlines()[-1]
        assert f"The last line says: `{last}`" in README


def test_toml_example_and_list_of_groups_are_true() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    entry_points = tomllib.loads(block)["project"]["entry-points"]
    assert set(entry_points) <= set(GROUPS)
    for group in GROUPS.values():
        assert f"`{group.name.removeprefix('mm_core.')}`" in README
