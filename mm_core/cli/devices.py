"""The devices of this machine, as `mm doctor` tells them: their files, what hides some, and whether torch can use them.

Torch is not imported here. Only where torch_npu is installed it is tried in a process of its own, for no metadata tell
whether it finds its CANN; where it does not, nothing that imports torch works.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from typing import Any

from mm_core.cli.diagnosis import Problem, problem
from mm_core.config.devices import VISIBLE, broken_torch_npu
from mm_core.config.environment import read, variables
from mm_core.config.machine import device_files

_LIBRARY = {"cuda": "torch", "npu": "torch-npu"}
_TRY = """
import json
try:
    import torch, torch_npu
    print(json.dumps({"count": torch.npu.device_count()}))
except Exception as error:
    print(json.dumps({"kind": type(error).__name__, "error": str(error)}))
"""


def describe_devices() -> tuple[list[dict[str, Any]], list[Problem]]:
    """Return one row for each type of accelerator, and what is wrong with them.

    A row has `type`; `files`, the number of device files; `visible`, the value of the variable that hides some, or
    None; `library`, what drives them; `version`, its version or None; `usable`, how many of them that library finds:
    None if that is not known without importing torch.
    """
    rows, problems = [], []
    for device, library in _LIBRARY.items():
        version = _version(library)
        row: dict[str, Any] = {
            "type": device,
            "files": device_files(device),
            "visible": read(VISIBLE[device]),
            "library": library,
            "version": version,
            "usable": None,
        }
        if device == "cuda" and row["files"] and version is not None and version.endswith("+cpu"):
            row["usable"] = 0
            problems.append(
                problem("warning", "cpu-torch", "torch", f"torch {version} cannot use CUDA devices")
            )
        if device == "npu" and version is None and row["files"]:
            row["usable"] = 0
            problems.append(problem("warning", "no-torch-npu", "torch-npu", "torch-npu is not installed"))
        elif device == "npu" and version is not None:
            row["usable"], wrong = _try_torch_npu()
            problems += wrong
        rows.append(row)
    return rows, problems


def devices_text(rows: list[dict[str, Any]]) -> str:
    """One line for the table form of `mm doctor`."""
    words = [
        _words(row)
        for row in rows
        if row["files"] or row["usable"] or (row["type"] == "npu" and row["version"])
    ]
    return f"devices: {'; '.join(words) or 'no accelerator is seen; jobs run on the CPU'}\n"


def _words(row: dict[str, Any]) -> str:
    count = row["files"] if row["usable"] is None else row["usable"]
    hidden = f", {VISIBLE[row['type']]}={row['visible']}" if row["visible"] is not None else ""
    return f"{count} {row['type']} ({row['library']} {row['version'] or 'missing'}{hidden})"


def _try_torch_npu() -> tuple[int, list[Problem]]:
    """How many NPUs torch_npu finds, and what is wrong if that is none."""
    # Without the variable, a torch_npu that cannot be imported would fail `import torch` first, and say less.
    environment = {**variables(), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        said = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
        said = {"kind": type(error).__name__, "error": "its import ended without an answer"}
    if "error" in said:
        return 0, [_broken(said["kind"], said["error"])]
    if said["count"] == 0:
        return 0, [problem("warning", "no-npu", "torch-npu", "torch-npu is installed, and finds no NPU")]
    return int(said["count"]), []


def _broken(kind: str, error: str) -> Problem:
    message, _, mend = broken_torch_npu(type(kind, (Exception,), {})(error)).partition("): ")
    found = problem("error", "broken-torch-npu", "torch-npu", f"{message})")
    return replace(found, mend=mend[:1].upper() + mend[1:].rstrip("."))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
