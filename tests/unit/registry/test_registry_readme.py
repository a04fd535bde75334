"""The examples of registry/README.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mm_registry import GROUPS, Status
from mm_registry.claims import misnamed
from mm_registry.selection_files import read_layer

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


def test_toml_examples_and_lists_are_true(tmp_path: Path) -> None:
    declared, selected = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    entry_points = tomllib.loads(declared)["project"]["entry-points"]
    assert set(entry_points) <= set(GROUPS)
    for group, entries in entry_points.items():
        assert [misnamed(group, id) for id in entries] == [None] * len(entries)
    (tmp_path / "mmzoo.toml").write_text(selected, encoding="utf-8")
    layer = read_layer(tmp_path / "mmzoo.toml")
    assert (layer.disable, layer.prefer) == (
        {"mmzoo-plugin-haar"},
        {"predictor/wandit": "mmzoo-plugin-wan22"},
    )
    for status in Status:
        assert f"| `{status}` |" in README
    for group in GROUPS.values():
        assert f"`{group.name.removeprefix('mm_core.')}`" in README
