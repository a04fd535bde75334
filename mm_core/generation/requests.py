"""What is asked of a pipeline: one request for each video, and which of them are made together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mm_core.config.given_frames import Images
from mm_core.generation.frames import Size, fitting_size, read_frames
from mm_registry.errors import UserError

if TYPE_CHECKING:
    import torch

    from mm_core.config.generation_job import GenerationJob


@dataclass(frozen=True)
class VideoRequest:
    """One video.

    Attributes:
        index: its number in the job, which with the seed keys its noise.
        prompt: what it shows.
        first, last: files of the frames that it begins and ends with.
        size: (height, width) in pixels; 0 where the pipeline alone decides.
    """

    index: int
    prompt: str
    first: str | None
    last: str | None
    size: Size


def requests_of(
    prompts: Sequence[str], images: Images, repeats: int, indices: Sequence[int] | None = None
) -> list[VideoRequest]:
    """Return `repeats` requests for each prompt, with its images; sizes are filled in later.

    Args:
        images: as many as prompts, or none.
        indices: numbers of the videos; 0, 1, … by default.

    Raises:
        UserError: there are other numbers of images than of prompts.
    """
    for what, files in (("first", images.first), ("last", images.last)):
        if files and len(files) != len(prompts):
            raise UserError(
                f"{len(files)} images of {what} frames for {len(prompts)} prompts; give one for each"
            )
    rows = [
        (prompt, images.first[n] if images.first else None, images.last[n] if images.last else None)
        for n, prompt in enumerate(prompts)
        for _ in range(repeats)
    ]
    numbers = range(len(rows)) if indices is None else indices
    if len(numbers) != len(rows):
        raise ValueError(f"{len(numbers)} indices for {len(rows)} videos")
    return [VideoRequest(index, *row, size=(0, 0)) for index, row in zip(numbers, rows, strict=True)]


def batches_of(requests: Sequence[VideoRequest], size: int) -> Iterator[list[VideoRequest]]:
    """Yield requests in order, up to `size` together; those of one batch have one size of video."""
    batch: list[VideoRequest] = []
    for request in requests:
        if batch and (len(batch) == size or request.size != batch[0].size):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def sized(job: GenerationJob, pipeline: Any, requests: Sequence[VideoRequest]) -> list[VideoRequest]:
    """Give each request with a first frame its size: that of the file, or with `max_hxw` that of the frame."""
    area = job.model.max_hxw

    def size(first: str) -> Size:
        if area is None:
            return pipeline.height, pipeline.width
        return fitting_size(first, area, pipeline.size_steps)

    return [r if r.first is None else replace(r, size=size(r.first)) for r in requests]


def given_frames(job: GenerationJob, batch: Sequence[VideoRequest]) -> dict[str, torch.Tensor]:
    """The frames that the videos of a batch begin and end with, as the pipeline takes them; nothing for text alone."""
    frames = {}
    for name in ("first", "last"):
        paths = [path for request in batch if (path := getattr(request, name)) is not None]
        if paths:
            crop, fitted = bool(job.model.crop_for_hw), job.model.max_hxw is not None
            frames[f"{name}_frames"] = read_frames(paths, batch[0].size, crop=crop, fitted=fitted)
    return frames


def seed_of(job: GenerationJob, seed: int | None = None) -> int:
    """The seed of the noise: the one that is given, else that of the file, else 0."""
    if seed is not None:
        return seed
    return int(job.components["pipeline"].fields.get("seed") or 0)
