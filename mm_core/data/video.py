"""Decoding of video files with PyAV: what a file holds, and chosen frames of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import av
import torch
from av.container import InputContainer
from av.video.stream import VideoStream
from torch import Tensor

from mm_core.data.errors import UnreadableSampleError

# Below this many seconds, decoding from the start is as fast as seeking and never wrong.
_SEEK_FROM_SECONDS = 2.0
# Containers that store no frame count leave an estimate, which may be this many frames too high.
_ESTIMATE_SLACK = 2


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        frames: number of frames; an estimate from the duration where the container does not store it.
        fps: mean frame rate in Hz.
        height, width: size in pixels as shown, that is after the rotation that a phone's file asks for.
    """

    frames: int
    fps: float
    height: int
    width: int


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read the header and the first frame of a video.

    Raises:
        UnreadableSampleError: the file is missing, empty, no video, truncated, or its first frame cannot be
            decoded.
    """
    with _opened(path, threads=1) as (container, stream):
        fps = _frame_rate(stream, path)
        frames = stream.frames
        if not frames:
            seconds = _duration(container, stream)
            if seconds is None:
                raise UnreadableSampleError(path, "neither the number of frames nor the duration is stored")
            frames = max(1, round(seconds * fps))
        first = next(container.decode(stream), None)
        if first is None:
            raise UnreadableSampleError(path, "no frame can be decoded")
        height, width = first.height, first.width
        if first.rotation % 180:
            height, width = width, height
        return VideoInfo(frames, fps, height, width)


def read_frames(
    path: str | os.PathLike[str], indices: Sequence[int], *, threads: int = 0
) -> Iterator[Tensor]:
    """Yield the frames of a video that `indices` name, each as uint8 RGB `[3, H, W]`, rotated as it is to be
    shown.

    Frame i is the one on screen at i / fps seconds, so that a file of variable frame rate keeps its timing.
    Only the frame at hand is held; what the caller keeps of it is the caller's.

    Args:
        indices: ascending frame numbers; a number may be repeated.
        threads: decoder threads, 0 for as many as FFmpeg likes.

    Raises:
        UnreadableSampleError: the file cannot be opened or decoded, a wanted frame is damaged, or it ends too
            early.
        ValueError: `indices` are not ascending.
    """
    if any(i < 0 for i in indices) or any(a > b for a, b in itertools.pairwise(indices)):
        raise ValueError(f"frame numbers must be ascending and not negative, not {list(indices)}")
    if not indices:
        return
    converted: tuple[av.VideoFrame, Tensor] | None = None
    for frame in _select(path, indices, threads):
        if converted is None or converted[0] is not frame:
            converted = (frame, _to_tensor(frame, path))
        yield converted[1]


def _select(path: str | os.PathLike[str], indices: Sequence[int], threads: int) -> Iterator[av.VideoFrame]:
    """Yield one decoded frame for each index."""
    for seek in (True, False):
        with _opened(path, threads=threads) as (container, stream):
            fps = _frame_rate(stream, path)
            target = indices[0] / fps
            if seek and not _seek(container, stream, target):
                continue
            frames = _timed(container, stream, fps, from_start=not seek)
            first = next(frames, None)
            if seek and (first is None or first[0] > target + 0.5 / fps):
                continue  # a broken seek table; decoding from the start is always right
            if first is None:
                raise UnreadableSampleError(path, "no frame can be decoded")
            slack = 0.0 if stream.frames else _ESTIMATE_SLACK / fps
            yield from _on_screen(itertools.chain([first], frames), indices, fps, slack, path)
            return


def _timed(
    container: InputContainer, stream: VideoStream, fps: float, *, from_start: bool
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield each decoded frame with the second, from the first frame on, at which it comes on screen."""
    start = None if from_start else stream.start_time
    for number, frame in enumerate(container.decode(stream)):
        if frame.pts is None:
            yield number / fps, frame  # a raw stream; never reached after a seek, which needs time stamps
            continue
        if start is None:
            start = frame.pts
        yield float((frame.pts - start) * stream.time_base), frame


def _on_screen(
    frames: Iterator[tuple[float, av.VideoFrame]],
    indices: Sequence[int],
    fps: float,
    slack: float,
    path: str | os.PathLike[str],
) -> Iterator[av.VideoFrame]:
    """Yield the frames on screen at indices[0] / fps, indices[1] / fps, … seconds."""
    half = 0.5 / fps
    done = 0
    time, held = next(frames)
    for next_time, frame in frames:
        while done < len(indices) and indices[done] / fps + half < next_time:
            yield held
            done += 1
        if done == len(indices):
            return
        time, held = next_time, frame
    duration = float(held.duration * held.time_base) if held.duration and held.time_base else 1 / fps
    end = time + max(duration, 1 / fps) - half + slack
    while done < len(indices) and indices[done] / fps < end:
        yield held
        done += 1
    if done < len(indices):
        raise UnreadableSampleError(
            path,
            f"it ends after {time + 1 / fps:.2f} s, but frame {indices[done]}, at {indices[done] / fps:.2f} "
            "s, is wanted; the file is truncated or its annotation is wrong",
        )


def _seek(container: InputContainer, stream: VideoStream, seconds: float) -> bool:
    """Go to the key frame before `seconds`; False where that is not worth it or cannot be done."""
    if seconds < _SEEK_FROM_SECONDS or stream.start_time is None or stream.time_base is None:
        return False
    try:
        container.seek(stream.start_time + int(seconds / stream.time_base), stream=stream, backward=True)
    except av.error.FFmpegError:
        return False
    return True


def _to_tensor(frame: av.VideoFrame, path: str | os.PathLike[str]) -> Tensor:
    """uint8 RGB `[3, H, W]`, turned upright."""
    if frame.is_corrupt:
        raise UnreadableSampleError(path, f"the frame at {frame.time} s is damaged")
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)  # [3, H, W]
    quarters = round(frame.rotation / 90)  # counter-clockwise
    return torch.rot90(pixels, quarters, dims=(1, 2)) if quarters % 4 else pixels


def _frame_rate(stream: VideoStream, path: str | os.PathLike[str]) -> float:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    if not rate:
        raise UnreadableSampleError(path, "its frame rate is not stored")
    return float(rate)


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds, from the stream or else the container."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    return None


@contextmanager
def _opened(path: str | os.PathLike[str], *, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first video stream; FFmpeg's errors inside become `UnreadableSampleError`s."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableSampleError(path, reason.lower()) from error
    if size == 0:
        raise UnreadableSampleError(path, "the file is empty")
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise UnreadableSampleError(path, "it holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableSampleError(path, f"it cannot be decoded ({reason})") from error
