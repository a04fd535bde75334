"""Which annotations of a set can be trained on, and what shape of clip each gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mm_core.data.annotations import Annotation
from mm_core.data.buckets import ClipShape
from mm_core.data.errors import UnreadableSampleError
from mm_core.data.frames import FrameRule
from mm_core.data.media_files import is_image, probe_file
from mm_core.data.resolution import ResolutionRule
from mm_core.random import keyed_seed

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """An annotation with what the file itself said where the annotation was silent.

    Attributes:
        frames: from `annotation.first_frame` on.
        fps: Hz.
        shape: of its clips; None where the file cannot be read.
    """

    annotation: Annotation
    frames: int
    fps: float
    shape: ClipShape | None = None

    @property
    def image(self) -> bool:
        """Whether it is an image: a clip of one frame, whatever the rules for length say."""
        return is_image(self.annotation.path)


@dataclass(frozen=True, slots=True)
class Refused:
    """An annotation that a rule leaves out: `rule` in two words, `reason` with the numbers."""

    annotation: Annotation
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A sample whose file cannot be read."""

    sample: Sample
    error: UnreadableSampleError


@dataclass(frozen=True, slots=True)
class Rules:
    """What is asked of a sample.

    Attributes:
        clip_size: from height and width of the frames to those of the clip (`mm_core.data.transforms.clip_size`).
        seed: the run's, for `drop_short_ratio`.
    """

    frames: FrameRule
    resolution: ResolutionRule
    clip_size: Callable[[int, int], Size]
    seed: int = 0

    def judged(self, annotations: Iterable[Annotation]) -> Iterator[Sample | Refused | Unreadable]:
        """Yield what becomes of each annotation. Opens the files whose annotations do not say all."""
        for number, annotation in enumerate(annotations):
            yield self._judge(annotation, number)

    def _judge(self, annotation: Annotation, number: int) -> Sample | Refused | Unreadable:
        image = is_image(annotation.path)
        frames = 1 if image else annotation.num_frames
        fps = 1.0 if image else annotation.fps
        height, width = annotation.height, annotation.width
        if frames is None or fps is None or height is None or width is None:
            try:
                info = probe_file(annotation.path)
            except UnreadableSampleError as error:
                sample = Sample(annotation, frames or 1, fps or self.frames.train_fps)
                return Unreadable(sample, error)
            frames = frames or max(1, info.frames - annotation.first_frame)
            fps = fps or info.fps
            height, width = height or info.height, width or info.width
        if annotation.crop is not None:
            left, right, top, bottom = annotation.crop
            height, width = bottom - top, right - left
        chance = keyed_seed(self.seed, "drop_short", number) / 2**64
        too_short = None if image else self.frames.short_reason(frames, fps, chance)
        if too_short is not None:
            return Refused(annotation, "too short", too_short)
        refusal = self.resolution.refusal(height, width)
        if refusal is not None:
            return Refused(annotation, "wrong shape", refusal)
        length = 1 if image else self.frames.length(frames, fps)
        return Sample(annotation, frames, fps, ClipShape(length, *self.clip_size(height, width)))
