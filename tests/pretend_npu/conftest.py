"""What the tests here need: the library, built once, and the environment of a process that has the pretend NPU.

Nothing of it happens in the tests' own process, for a device that was added to torch never goes away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ROOT
from tests.pretend_npu.build import missing

HERE = Path(__file__).resolve().parent
_METADATA = "Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(600))  # the first one builds, beside others that may compute
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=f"the pretend NPU cannot be built: {reason}"))


@pytest.fixture(scope="session")
def library() -> str:
    """The path of the built library."""
    done = subprocess.run(
        [sys.executable, HERE / "build.py"], capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def npu(library: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process in which torch_npu is installed, and finds two NPUs."""
    site = tmp_path_factory.mktemp("site")
    (site / "torch_npu").symlink_to(HERE / "torch_npu")
    metadata = site / "torch_npu-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(_METADATA, encoding="utf-8")
    # As the real one: torch imports it by itself.
    (metadata / "entry_points.txt").write_text(
        "[torch.backends]\ntorch_npu = torch_npu:_autoload\n", encoding="utf-8"
    )
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "PRETEND_NPU_LIBRARY": library, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run_case(npu: dict[str, str]) -> Callable[..., Any]:
    """Run a function of `cases.py` in a process with the pretend NPU, and return what it returns."""

    def run(name: str, *arguments: Any, device: str = "npu", **variables: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "tests.pretend_npu.cases", name, json.dumps(arguments)],
            cwd=ROOT, env={**os.environ, **npu, "MM_DEVICE": device, **variables},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
