"""The real Megatron-Core, installed for the occasion: `megatron_*cases.py` are run with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm_core.megatron import INSTALL
from tests.e2e.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_everything_that_is_said_to_work_with_megatron_core_works(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command, *words = INSTALL.split()
    assert command == "pip"  # what the user is told to type is what is installed here
    fetch = [sys.executable, "-m", "pip", *words, "--target", site, "--quiet", "--disable-pip-version-check"]
    fetched = subprocess.run(fetch, capture_output=True, text=True, check=False, timeout=200)
    if fetched.returncode:
        assert "No matching distribution" in fetched.stderr or "Connection" in fetched.stderr, fetched.stderr
        pytest.skip("megatron-core cannot be fetched here: no network, or another Python")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    cases = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "-rs",
        *sorted((ROOT / "tests/distributed").glob("megatron_*cases.py")),
    ]
    done = subprocess.run(
        cases, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "SKIPPED" not in done.stdout
    assert len(list((ROOT / "tests/distributed").glob("megatron_*cases.py"))) == 2  # both were run
