"""Videos as Qwen3-VL takes them: which frames, how large, and their patches. Torch alone: transformers'
`Qwen3VLVideoProcessor`, whose numbers these are, needs torchvision.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mm_core.data.chat.media import name_of, video_frames, video_info
from mm_core.data.chat.protocol import Video, VideoSource
from mm_core.data.errors import DataError, UnreadableSampleError

_BICUBIC = 3  # Pillow's number
_MOST_ELONGATED = 200
_AS_WRITTEN = (
    "fps",
    "max_frames",
    "min_frames",
    "patch_size",
    "merge_size",
    "temporal_patch_size",
    "cap_pixels_per_frame",
    "max_video_tokens",
)


@dataclass(frozen=True)
class VideoSettings:
    """How a video becomes patches; the names are those of video_preprocessor_config.json.

    Attributes:
        shortest_edge, longest_edge: least and largest number of pixels of a whole video, all frames together.
        cap_pixels_per_frame: whether a frame gets at most its share of `longest_edge`, and `max_video_tokens` merged patches.
        pixels_per_frame: (least, largest) of one frame, in place of all the above; None: those.
        fps: frames a second that are taken.
        min_frames, max_frames: of a video.
        patch_size, merge_size, temporal_patch_size: pixels of a patch's side, patches of a merged one's, frames of a patch.
        image_mean, image_std: of the three colours, for values from 0 to 1.
    """

    shortest_edge: int = 128 * 32 * 32
    longest_edge: int = 768 * 32 * 32
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768
    pixels_per_frame: tuple[int, int] | None = None
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def of(
        cls,
        folder: Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
    ) -> VideoSettings:
        """Read the settings of a folder as transformers does: processor_config.json, video_preprocessor_config.json, or
        preprocessor_config.json.

        Args:
            min_pixels, max_pixels: of one frame, in place of the folder's of a whole video.
            fps, max_frames: in place of the folder's.

        Raises:
            DataError: a file cannot be read, or asks for what is not done here.
        """
        file, written = _written(folder)
        for key, only in (
            ("do_resize", True),
            ("do_rescale", True),
            ("do_normalize", True),
            ("do_sample_frames", True),
            ("do_center_crop", False),
            ("resample", _BICUBIC),
            ("rescale_factor", 1 / 255),
            ("num_frames", None),
        ):
            value = written.get(key)
            close = isinstance(value, float) and only is not None and math.isclose(value, only, rel_tol=1e-6)
            if value is not None and value != only and not close:
                raise DataError(
                    f'{file}: "{key}" is {json.dumps(value)}, but only {json.dumps(only)} is supported'
                )
        try:
            size = written.get("size") or {}
            given: dict[str, Any] = {
                "shortest_edge": written.get("min_pixels") or size.get("shortest_edge"),
                "longest_edge": written.get("max_pixels") or size.get("longest_edge"),
                **{key: written.get(key) for key in _AS_WRITTEN},
                **{key: _colours(written.get(key)) for key in ("image_mean", "image_std")},
            }
            made = cls(**{key: value for key, value in given.items() if value is not None})
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file} does not hold settings of videos as transformers writes them: {error}"
            ) from error
        made = replace(
            made,
            fps=made.fps if fps is None else fps,
            max_frames=made.max_frames if max_frames is None else max_frames,
        )
        if min_pixels is None and max_pixels is None:
            return made
        least = min_pixels if min_pixels is not None else 0
        most = max_pixels if max_pixels is not None else max(made.longest_edge, least)
        return replace(made, pixels_per_frame=(least, most))

    def indices(self, frames: int, rate: float) -> tuple[int, ...]:
        """Return which frames of a video of `frames` at `rate` Hz are taken: evenly spread, the first and the last among
        them.
        """
        wanted = int(frames / rate * self.fps)
        count = min(max(wanted, self.min_frames), self.max_frames, frames)
        return tuple(np.linspace(0, frames - 1, count).round().astype(int).tolist())

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Return height and width, in pixels, to which the frames of a video are resized: whole merged patches, the
        video's own ratio as nearly as they allow, and within the limits of its area.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        unit = self.patch_size * self.merge_size
        if min(height, width) < unit:
            enlarge = max(unit / height, unit / width)
            height, width = int(height * enlarge), int(width * enlarge)
        if max(height, width) > _MOST_ELONGATED * min(height, width):
            raise ValueError(
                f"one side is more than {_MOST_ELONGATED} times the other ({width} × {height} pixels)"
            )
        least, most = self.shortest_edge, self.longest_edge
        if self.pixels_per_frame is not None:
            least, most = (frames * pixels for pixels in self.pixels_per_frame)
        elif self.cap_pixels_per_frame:
            share = min(self.max_video_tokens * unit**2, self.longest_edge // frames)
            most = frames * max(share, int(self.shortest_edge * 1.05))
        rows, columns = round(height / unit), round(width / unit)
        slices = round(frames / self.temporal_patch_size) * self.temporal_patch_size
        area = slices * rows * columns * unit**2
        if area > most:
            shrink = math.sqrt(frames * height * width / most)
            rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
        elif area < least:
            enlarge = math.sqrt(least / (frames * height * width))
            rows, columns = (math.ceil(side * enlarge / unit) for side in (height, width))
        return rows * unit, columns * unit

    def seconds(self, indices: Iterable[int], rate: float) -> list[float]:
        """Return the second at which each patch in time is shown: the middle of its first and last frame."""
        step = self.temporal_patch_size
        chosen = list(indices)
        chosen += chosen[-1:] * (-len(chosen) % step)
        return [(chosen[i] / rate + chosen[i + step - 1] / rate) / 2 for i in range(0, len(chosen), step)]

    def patches(self, frames: Tensor) -> Tensor:
        """Cut frames into patches, those of a merged one together.

        Args:
            frames: uint8 `[T, 3, H, W]`, of the size that `size` says. T that is no multiple of `temporal_patch_size` is
                filled up by the last frame.

        Returns:
            Normalised values fp32 `[P, 3 · temporal_patch_size · patch_size²]`.
        """
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (self.image_mean, self.image_std))
        values = (frames.float() - mean) / std
        if short := -len(values) % self.temporal_patch_size:
            values = torch.cat([values, values[-1:].expand(short, -1, -1, -1)])
        patch, merge = self.patch_size, self.merge_size
        values = values.unflatten(0, (-1, self.temporal_patch_size))  # [t, temporal, 3, H, W]
        values = values.unflatten(4, (-1, merge, patch)).unflatten(3, (-1, merge, patch))
        # [t, temporal, 3, rows, merge, patch, columns, merge, patch]
        values = values.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return values.flatten(5).flatten(0, 4)

    def read(self, source: VideoSource) -> tuple[Tensor, tuple[int, int, int], list[float]]:
        """Return patches, grid and seconds of a video. One in memory is taken with all its frames.

        Raises:
            UnreadableSampleError: it cannot be decoded, or has a shape that no limit allows.
        """
        indices, rate, (height, width) = self._taken(source)
        frames = [_resized(frame, height, width) for frame in video_frames(source, indices)]
        grid = (
            -(-len(frames) // self.temporal_patch_size),
            height // self.patch_size,
            width // self.patch_size,
        )
        return self.patches(torch.stack(frames)), grid, self.seconds(indices, rate)

    def describe(self, source: VideoSource) -> tuple[tuple[int, int, int], list[float]]:
        """Return grid and seconds of a video as `read` does, from its header and first frame."""
        indices, rate, (height, width) = self._taken(source)
        return self._grid(len(indices), height, width), self.seconds(indices, rate)

    def _grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches in time, height and width of resized frames."""
        return -(-frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def _taken(self, source: VideoSource) -> tuple[tuple[int, ...], float, tuple[int, int]]:
        """Which frames are taken, the file's rate, and the size that they get."""
        info = video_info(source)
        indices = source.indices if isinstance(source, Video) else self.indices(info.frames, info.fps)
        try:
            return indices, info.fps, self.size(len(indices), info.height, info.width)
        except ValueError as error:
            raise UnreadableSampleError(name_of(source), str(error)) from error


def _resized(frame: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 `[3, H, W]`; in integers, as torchvision does, so that values round as there."""
    resized: Tensor = F.interpolate(
        frame[None], (height, width), mode="bicubic", align_corners=False, antialias=True
    )[0]
    return resized


def _written(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file with the settings of videos, and what it says about them; nothing, if the folder has none."""
    for name, key in (
        ("processor_config.json", "video_processor"),
        ("video_preprocessor_config.json", None),
        ("preprocessor_config.json", None),
    ):
        file = folder / name
        if not file.is_file():
            continue
        try:
            written = json.loads(file.read_text(encoding="utf-8"))
            found = written.get(key) if key else written
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{file} cannot be read as JSON settings of videos: {error}") from error
        if isinstance(found, dict):
            return file, found
    return folder, {}


def _colours(values: Any) -> tuple[float, ...] | None:
    return tuple(float(value) for value in values) if isinstance(values, list) else None
