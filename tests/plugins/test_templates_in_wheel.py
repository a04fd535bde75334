"""`mm plugin new` of an installed wheel: the templates are in it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("role", ["predictor", "ae"])
def test_an_installed_core_writes_plugins(installed: Any, tmp_path: Path, role: str) -> None:
    command = [installed.root / "bin" / "mm", "plugin", "new", "fresh", "--role", role]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mmzoo-plugin-fresh/pyproject.toml").is_file()
    assert (tmp_path / "mmzoo-plugin-fresh/mm_plugin_fresh/py.typed").is_file()
