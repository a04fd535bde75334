"""Which frames of a video become a training clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Rates closer than this are the same rate (23.976 and 24, 29.97 and 30).
_SAME_RATE_HZ = 0.1


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

    def available(self, total: int, fps: float) -> list[int]:
        """Return all frames of a video of `total` frames at `fps` Hz that this rule steps on."""
        step = self._step(fps)
        count = math.ceil(total / step - 1e-9)
        if self.speed_factor > 1 and count > self.num_frames:
            step *= min(self.speed_factor, count / self.num_frames)
            count = max(self.num_frames, math.ceil(total / step - 1e-9))
        return [min(int(i * step + 1e-9), total - 1) for i in range(count)]

    def choose(self, total: int, fps: float, draw: int) -> list[int]:
        """Return the frames of one clip: `num_frames` of them from a place that `draw`, any integer, decides.

        A video with fewer gives 1 + n·`temporal_stride` from its beginning. Call `short_reason` first.
        """
        frames = self.available(total, fps)
        extra = len(frames) - self.num_frames
        if extra >= 0:
            begin = draw % (extra + 1)
            return frames[begin : begin + self.num_frames]
        return frames[: 1 + (len(frames) - 1) // self.temporal_stride * self.temporal_stride]

    def short_reason(self, total: int, fps: float, chance: float) -> str | None:
        """Return why a video is too short to be used, or None.

        Args:
            chance: a uniform number in [0, 1), the same whenever the same video is asked about.
        """
        count = len(self.available(total, fps))
        if count >= self.num_frames:
            return None
        if chance < self.drop_short_ratio:
            return f"{count} frames after sampling, num_frames is {self.num_frames}"
        kept = 1 + (count - 1) // self.temporal_stride * self.temporal_stride
        if kept < self.min_num_frames:
            return f"{kept} usable frames, min_num_frames is {self.min_num_frames}"
        return None

    def _step(self, fps: float) -> float:
        if not self.auto_interval:
            return self.frame_interval
        return 1.0 if abs(fps - self.train_fps) < _SAME_RATE_HZ else fps / self.train_fps
