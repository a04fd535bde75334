"""Files that give clips: videos, and images as videos of one frame."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mm_core.data.chat.media import image_size, read_image
from mm_core.data.errors import UnreadableSampleError
from mm_core.data.video import VideoInfo, probe, read_frames

#: Endings of files that Pillow reads; every other file is a video. An animated one gives its first frame.
IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an image by the ending of its name."""
    return os.fspath(path).lower().endswith(IMAGE_ENDINGS)


def probe_file(path: str | os.PathLike[str]) -> VideoInfo:
    """Return what a video or an image holds; an image has one frame and, since nothing moves, 1 Hz.

    Raises:
        UnreadableSampleError: as `mm_core.data.video.probe` and `mm_core.data.chat.media.image_size`.
    """
    if not is_image(path):
        return probe(path)
    height, width = image_size(path)
    return VideoInfo(1, 1.0, height, width)


def file_frames(
    path: str | os.PathLike[str], indices: Sequence[int], *, threads: int = 0
) -> Iterator[Tensor]:
    """Yield the frames that `indices` name, each uint8 RGB `[3, H, W]`, upright.

    Raises:
        UnreadableSampleError: as `mm_core.data.video.read_frames` and `mm_core.data.chat.media.read_image`.
    """
    if not is_image(path):
        yield from read_frames(path, indices, threads=threads)
        return
    if any(indices):
        raise UnreadableSampleError(path, f"an image has one frame, but frame {max(indices)} is wanted (cut)")
    pixels = torch.from_numpy(np.asarray(read_image(path)).copy()).permute(2, 0, 1)
    for _ in indices:
        yield pixels
