"""Which frames of a video become a training clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mm_core.data.errors import DataError

# Rates closer than this are the same rate (23.976 and 24, 29.97 and 30).
_SAME_RATE_HZ = 0.1
_LARGEST_STEP = 1e6  # Hz, or frames: far above every camera's rate
_MOST_STEPS = 2**53  # exact as a float


@dataclass(frozen=True, slots=True)
class FrameRule:
    """How a video is sampled in time; the fields are those of `preprocess_parameters`.

    Attributes:
        num_frames: frames of a clip.
        train_fps: the rate, in Hz, at which clips are sampled when `auto_interval` is on.
        auto_interval: step through a video by its rate / `train_fps`, so that motion keeps its speed (a
            slower video repeats frames). Off: step by `frame_interval`.
        frame_interval: step in frames when `auto_interval` is off.
        speed_factor: above 1, videos that are long enough are sped up by this factor, or by as much as still
            leaves `num_frames`.
        min_num_frames: clips with fewer frames than this (and than `num_frames`) are dropped.
        drop_short_ratio: share of the videos shorter than `num_frames` that is dropped; the others give
            shorter clips.
        temporal_stride: shorter clips are cut to 1 + n·stride frames, which a causal video autoencoder
            encodes exactly.
    """

    num_frames: int = 16
    train_fps: float = 24.0
    auto_interval: bool = True
    frame_interval: float = 1.0
    speed_factor: float = 1.0
    min_num_frames: int = 1
    drop_short_ratio: float = 1.0
    temporal_stride: int = 4

    def __post_init__(self) -> None:
        for name in ("train_fps", "frame_interval"):
            value = getattr(self, name)
            if not 0 < value <= _LARGEST_STEP:
                raise DataError(
                    f"preprocess_parameters.{name} is {value:g}, but must be above 0 and at most {_LARGEST_STEP:g}"
                )

    def count(self, total: int, fps: float) -> int:
        """Return how many frames of a video of `total` frames at `fps` Hz this rule steps on."""
        return self._grid(total, fps)[0]

    def choose(self, total: int, fps: float, draw: int) -> list[int]:
        """Return the frames of one clip: `num_frames` of them from a place that `draw`, any integer, decides.

        A video with fewer gives 1 + n·`temporal_stride` from its beginning. Call `short_reason` first.
        """
        count, step = self._grid(total, fps)
        length = self._length(count)
        begin = draw % (count - length + 1) if count >= self.num_frames else 0
        return [min(int(i * step + 1e-9), total - 1) for i in range(begin, begin + length)]

    def length(self, total: int, fps: float) -> int:
        """Return how many frames `choose` gives, whatever is drawn."""
        return self._length(self.count(total, fps))

    def short_reason(self, total: int, fps: float, chance: float) -> str | None:
        """Return why a video is too short to be used, or None.

        Args:
            chance: a uniform number in [0, 1), the same whenever the same video is asked about.
        """
        count = self.count(total, fps)
        if count >= self.num_frames:
            return None
        if chance < self.drop_short_ratio:
            return f"{count} frames after sampling, num_frames is {self.num_frames}"
        kept = self._length(count)
        if kept < self.min_num_frames:
            return f"{kept} usable frames, min_num_frames is {self.min_num_frames}"
        return None

    def _length(self, count: int) -> int:
        if count >= self.num_frames:
            return self.num_frames
        return 1 + (count - 1) // self.temporal_stride * self.temporal_stride

    def _grid(self, total: int, fps: float) -> tuple[int, float]:
        """How many frames there are to step on, and the step in frames of the video."""
        step = self._step(fps)
        count = _steps(total, step)
        if self.speed_factor > 1 and count > self.num_frames:
            step *= min(self.speed_factor, count / self.num_frames)
            count = max(self.num_frames, _steps(total, step))
        return count, step

    def _step(self, fps: float) -> float:
        if not self.auto_interval:
            return self.frame_interval
        return 1.0 if abs(fps - self.train_fps) < _SAME_RATE_HZ else fps / self.train_fps


def _steps(total: int, step: float) -> int:
    """Steps that fit; bounded, so that a rate near zero, which a damaged file may claim, cannot overflow."""
    steps = total / step if step > 0 else math.inf
    return max(1, math.ceil(min(steps, _MOST_STEPS) - 1e-9))
