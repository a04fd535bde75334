"""Video files and pictures of videos. Frames are uint8 RGB arrays `[T, H, W, 3]`."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import numpy.typing as npt

from mm_registry.errors import UserError

if TYPE_CHECKING:
    import torch

Frames = npt.NDArray[np.uint8]

_ENCODER = {
    "crf": "10",  # x264's constant quality: 0 is lossless, 18 looks so
    "preset": "medium",
    # Its AVX-512 code reads memory that it has not written: the same frames would give other bytes each time.
    **({"x264-params": "asm=SSE4.2"} if platform.machine().lower() in ("x86_64", "amd64") else {}),
}


def to_frames(video: torch.Tensor) -> Frames:
    """Video `[3, T, H, W]` in [-1, 1] -> frames, rounded to the nearest level."""
    scaled = ((video.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    frames: Frames = scaled.permute(1, 2, 3, 0).contiguous().numpy().astype(np.uint8)
    return frames


def write_video(path: str | Path, frames: Frames, fps: int | float | Fraction) -> Path:
    """Write an H.264 MP4 (yuv420p, which every player reads) of high quality.

    It is written under a temporary name in the same folder and renamed, so a file under the final name is
    complete. A file that
    is there already is kept: the new one gets the first free name `stem-1.mp4`, `stem-2.mp4`, …

    Args:
        frames: sides that are odd are extended by their last row or column, since yuv420p halves them.

    Returns:
        The path that was written.

    Raises:
        ValueError: frames are not `[T, H, W, 3]` uint8 with T >= 1.
        UserError: the file cannot be written.
    """
    frames = _checked(frames)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.stem}-{id(frames):x}.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: its folder cannot be made: {error}") from error
    try:
        with av.open(str(temporary), mode="w", format="mp4", options={"movflags": "faststart"}) as container:
            stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = dict(_ENCODER)
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        return move_to_free_name(temporary, path)
    except (OSError, av.FFmpegError) as error:
        raise UserError(f"{path}: the video cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def move_to_free_name(temporary: Path, path: Path) -> Path:
    """Rename to `path`, or to `stem-1`, `stem-2`, … if that exists. The name is taken first, so that of two
    processes each gets its own.

    Raises:
        UserError: ten thousand such files exist.
    """
    for number in range(10_000):
        target = path if number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            target.open("xb").close()
        except FileExistsError:
            continue
        return temporary.replace(target)
    raise UserError(f"{path}: ten thousand files of this name exist; choose another save_path")


def read_video(path: str | Path, max_frames: int | None = None) -> Frames:
    """Decode a video file to frames.

    Raises:
        UserError: it cannot be read, or holds no frame.
    """
    try:
        with av.open(str(path)) as container:
            images: list[npt.NDArray[Any]] = []
            for frame in container.decode(video=0):
                if max_frames is not None and len(images) == max_frames:
                    break
                images.append(frame.to_ndarray(format="rgb24"))
    except (OSError, IndexError, av.FFmpegError) as error:
        raise UserError(f"{path}: the video cannot be read: {error}") from error
    if not images:
        raise UserError(f"{path}: the file holds no frame")
    return np.stack(images)


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all pixels; infinite for equal videos.

    Raises:
        ValueError: shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"videos of shapes {a.shape} and {b.shape} cannot be compared")
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def contact_sheet(frames: Frames, columns: int = 8) -> npt.NDArray[np.uint8]:
    """`columns` frames, evenly spaced, in one row: `[H, columns * W, 3]`."""
    frames = _checked(frames)
    picked = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    row: npt.NDArray[np.uint8] = np.concatenate([frames[i] for i in picked], axis=1)
    return row


def side_by_side(path: str | Path, videos: Mapping[str, Frames], columns: int = 6, scale: int = 2) -> Path:
    """Write a PNG with one labelled row of frames for each video. An existing file is replaced.

    Args:
        videos: label -> frames.
        columns: frames a row.
        scale: whole-number enlargement of pixels.
    """
    from PIL import Image, ImageDraw

    rows: Sequence[tuple[str, npt.NDArray[np.uint8]]] = [
        (label, contact_sheet(frames, columns).repeat(scale, axis=0).repeat(scale, axis=1))
        for label, frames in videos.items()
    ]
    caption = 18
    sheet = Image.new(
        "RGB",
        (max(row.shape[1] for _, row in rows), sum(row.shape[0] + caption for _, row in rows)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    top = 0
    for label, row in rows:
        draw.text((4, top + 3), label, fill="black")
        sheet.paste(Image.fromarray(row), (0, top + caption))
        top += caption + row.shape[0]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    sheet.save(temporary, format="PNG")
    return temporary.replace(path)


def _checked(frames: Frames) -> Frames:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be uint8 [T, H, W, 3] with T >= 1, not {frames.dtype} {frames.shape}")
    return frames
