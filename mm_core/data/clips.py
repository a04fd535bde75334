"""From a file to a clip: chosen frames, cropped and transformed, one frame at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mm_core.data.annotations import Annotation
from mm_core.data.cache import ClipCache
from mm_core.data.errors import UnreadableSampleError
from mm_core.data.media_files import file_frames
from mm_core.data.transforms import Transform


class ClipReader:
    """Reads clips; small sets are decoded once.

    Args:
        transform: from frames uint8 `[T, 3, H, W]` to a clip float32 `[T, 3, h, w]`, each frame alone.
        cache_bytes: host memory for clips that were read; 0 keeps none.
    """

    def __init__(self, transform: Transform, cache_bytes: int = 0) -> None:
        self._transform = transform
        self._cache = ClipCache(cache_bytes)

    def read(self, annotation: Annotation, frames: Sequence[int]) -> Tensor:
        """Decode and transform frames, counted from the annotated beginning, to float32 `[3, T, h, w]`.

        Held at a time: the clip, and the frame at hand in the file's own size.

        Raises:
            UnreadableSampleError: a frame cannot be read, or the crop lies outside of it.
        """
        cache_key = (annotation.path, annotation.first_frame, annotation.crop, tuple(frames))
        cached = self._cache.get(cache_key)
        if cached is not None:
            return cached
        indices = [annotation.first_frame + frame for frame in frames]
        decoded = file_frames(annotation.path, indices, threads=_decoder_threads())
        clip: Tensor | None = None
        # One by one: the work on a frame stays in the processor's cache, and takes no memory to speak of.
        for done, frame in enumerate(decoded):
            piece = self._transform(_crop(frame.unsqueeze(0), annotation))  # [1, 3, h, w]
            if clip is None:
                clip = torch.empty(3, len(indices), *piece.shape[-2:])
            clip[:, done] = piece[0]
        assert clip is not None, "a clip has at least one frame"
        self._cache.put(cache_key, clip)
        return clip


def _crop(piece: Tensor, annotation: Annotation) -> Tensor:
    if annotation.crop is None:
        return piece
    left, right, top, bottom = annotation.crop
    height, width = piece.shape[-2:]
    if right > width or bottom > height:
        raise UnreadableSampleError(
            annotation.path,
            f"crop {list(annotation.crop)} ({annotation.origin}) lies outside its {height}×{width} pixels",
        )
    return piece[..., top:bottom, left:right]


def _decoder_threads() -> int:
    """FFmpeg's own choice in the main process; a fair share of the cores in a loader worker."""
    worker = get_worker_info()
    return 0 if worker is None else max(1, (os.cpu_count() or 1) // worker.num_workers)
