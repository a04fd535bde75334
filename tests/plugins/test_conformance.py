"""Our own plugins pass the kit that we ask others to pass, and so do the core's generic components."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from mm_core.testing import conformance

# A worker imports diffusers and runs two ranks; on a busy machine that takes its time.
pytestmark = pytest.mark.timeout(300)

test_core = conformance("mmzoo-core")
test_haar = conformance("mmzoo-plugin-haar")
test_wan22 = conformance("mmzoo-plugin-wan22")
test_qwen3vl = conformance("mmzoo-plugin-qwen3vl")


@pytest.mark.parametrize("distribution", ["mmzoo-plugin-haar", "mmzoo-plugin-wan22"])
def test_installed_as_a_wheel_its_files_and_metadata_conform(installed: Any, distribution: str) -> None:
    done = subprocess.run(
        [installed.root / "bin" / "mm", "plugin", "check", distribution, "--format", "json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=installed.root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = {result["check"]: result["status"] for result in json.loads(done.stdout)["results"]}
    # These look at the RECORD of a real installation, not at an editable one's.
    for check in ("uninstall-leaves-no-files", "uninstall-leaves-no-ids", "nothing-runs-at-start-up"):
        assert statuses[check] == "passed"
