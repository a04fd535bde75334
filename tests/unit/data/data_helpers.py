"""What the tests of the data room share: paths of the shipped example, and frames that say their number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "examples" / "tiny" / "wan22-t2v"
CLIPS = (TINY / "clips" / "bunny.mp4", TINY / "clips" / "tower.mp4")
LEVEL = 10  # grey level of frame i is LEVEL * i, modulo 250


def grey_frame(index: int, height: int, width: int) -> np.ndarray:
    """A frame whose left half is the grey level of its index and whose right half is white."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[:, : width // 2] = LEVEL * index % 250
    return pixels


def index_of(frame: Any) -> int:
    """The index modulo 25 that `grey_frame` wrote into a frame `[3, H, W]`."""
    return round(float(frame[:, :, : frame.shape[-1] // 2].float().mean()) / LEVEL)


WriteVideo = Callable[..., Path]
