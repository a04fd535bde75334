"""What was asked of the pretend NPU, told to the test that started the process."""

from __future__ import annotations

import atexit
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pretend_npu_library as library
from torch_npu import npu


def report() -> dict[str, Any]:
    """How often each thing was asked, the bytes of each kind of copy, and the peak of memory by device."""
    asked: Counter[str] = Counter()
    copied: Counter[str] = Counter()
    for note in library.notes():
        copy = re.fullmatch(r"(copy .*) (\d+)", note)
        if copy is None:
            asked[note] += 1
        else:
            copied[copy[1]] += int(copy[2])
    peaks = [npu.max_memory_allocated(index) for index in range(npu.device_count())]
    return {"asked": dict(asked), "copied": dict(copied), "peaks": peaks}


def at_exit() -> None:
    folder = os.environ.get("PRETEND_NPU_REPORT")
    if folder is not None:
        atexit.register(_write, Path(folder), os.getpid())


def _write(folder: Path, process: int) -> None:
    if os.getpid() != process:  # a fork of the process that imported this, such as a loader's worker
        return
    rank = os.environ.get(
        "RANK", "0"
    )  # told to every rank but the first, whose process takes its variables back
    (folder / f"rank-{rank}.json").write_text(json.dumps(report()), encoding="utf-8")
