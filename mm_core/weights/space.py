"""Room on a disk, asked for before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from mm_core.weights.errors import WeightsError


def check_space(folder: Path, needed: int) -> None:
    """Make sure that a checkpoint fits on the disk; one process asks for all that write there.

    Args:
        folder: where it will be; it need not exist yet.
        needed: bytes.

    Raises:
        WeightsError: there is less room.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"{folder}: a checkpoint takes {_shown(needed)}, and its disk has {_shown(free)} left; nothing was "
            "written. Make room (--keep-last N removes older checkpoints), or --save on another disk."
        )


def _shown(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
