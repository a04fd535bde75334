"""Generation: from a checked inference file and prompts to video files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_core._lazy import lazy_exports

if TYPE_CHECKING:
    from mm_core.generation.build import build_pipeline
    from mm_core.generation.generate import generate
    from mm_core.generation.video import contact_sheet, psnr, read_video, side_by_side, to_frames, write_video

__all__ = [
    "build_pipeline",
    "contact_sheet",
    "generate",
    "psnr",
    "read_video",
    "side_by_side",
    "to_frames",
    "write_video",
]

_VIDEO = "mm_core.generation.video"
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "build_pipeline": "mm_core.generation.build",
        "contact_sheet": _VIDEO,
        "generate": "mm_core.generation.generate",
        "psnr": _VIDEO,
        "read_video": _VIDEO,
        "side_by_side": _VIDEO,
        "to_frames": _VIDEO,
        "write_video": _VIDEO,
    },
)
