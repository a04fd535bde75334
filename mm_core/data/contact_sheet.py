"""A contact sheet: frames of some samples of a set, as training gets them, on one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from mm_core.data.clips import ClipReader
from mm_core.data.errors import UnreadableSampleError
from mm_core.data.inspection import clip_frames
from mm_core.data.selection import Rules, Sample

FRAMES = 4
"""Frames of a sample that are shown, from its clip's first to its last."""
_CELL = (160, 120)  # width, height of a frame, in pixels
_GAP, _LINE = 4, 14
_PAPER, _INK, _FAULT = (24, 24, 24), (230, 230, 230), (255, 110, 110)
_LETTERS = 96  # of a line of text


def contact_sheet(samples: Sequence[Sample], rules: Rules, reader: ClipReader) -> Image.Image:
    """Draw a row for each sample: frames of one of its clips, after cropping and transforms, below file, shape and caption.

    A sample that cannot be read has the reason in its place.
    """
    row = 2 * _LINE + _CELL[1] + 2 * _GAP
    sheet = Image.new("RGB", (FRAMES * (_CELL[0] + _GAP) + _GAP, max(1, len(samples)) * row), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        top = number * row + _GAP
        captions, shape = sample.annotation.captions, str(sample.shape).replace("×", " x ")
        more = f" (and {len(captions) - 1} more)" if len(captions) > 1 else ""
        _write(draw, top, f"{sample.annotation.path.name}:  {shape}", _INK)
        _write(draw, top + _LINE, captions[0] + more, _INK)
        top += 2 * _LINE
        frames = clip_frames(sample, rules)
        chosen = sorted({round(k * (len(frames) - 1) / (FRAMES - 1)) for k in range(FRAMES)})
        try:
            clip = reader.read(sample.annotation, [frames[k] for k in chosen])
        except UnreadableSampleError as error:
            _write(draw, top + _GAP, error.reason, _FAULT)
            continue
        for place in range(len(chosen)):
            picture = _picture(clip[:, place])
            left = _GAP + place * (_CELL[0] + _GAP) + (_CELL[0] - picture.width) // 2
            sheet.paste(picture, (left, top + (_CELL[1] - picture.height) // 2))
    return sheet


def write_contact_sheet(path: Path, samples: Sequence[Sample], rules: Rules, reader: ClipReader) -> None:
    """Write `contact_sheet` as PNG."""
    contact_sheet(samples, rules, reader).save(path, "PNG")


def _picture(frame: Tensor) -> Image.Image:
    """A frame `[3, H, W]` in [-1, 1], as large as fits into a cell."""
    pixels = ((frame.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return ImageOps.contain(Image.fromarray(np.ascontiguousarray(pixels)), _CELL, Image.Resampling.LANCZOS)


def _write(draw: ImageDraw.ImageDraw, top: int, text: str, colour: tuple[int, int, int]) -> None:
    line = " ".join(text.split())
    # Pillow's own font has no glyphs beyond Latin: others show as boxes.
    draw.text((_GAP, top), line[:_LETTERS] + ("…" if len(line) > _LETTERS else ""), fill=colour)
