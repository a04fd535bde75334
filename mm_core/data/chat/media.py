"""Images and videos of conversations: from paths, bytes or decoded ones to pixels; their sizes without decoding."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mm_core.data.chat.protocol import Video
from mm_core.data.errors import UnreadableSampleError
from mm_core.data.video import VideoInfo, probe, read_frames

if TYPE_CHECKING:
    from torch import Tensor

    from mm_core.data.chat.protocol import ImageSource, VideoSource

_ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 turn an image by a quarter
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def name_of(source: ImageSource | VideoSource) -> str:
    """Return what messages call an image or a video: its path, or what it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    return "a video in memory" if isinstance(source, Video) else "an image in memory"


def read_image(source: ImageSource) -> Image.Image:
    """Decode an image to RGB, upright as its EXIF orientation says, as transformers' `load_image` does. Of an animation the
    first frame; transparency is dropped; 16 bits of grey become 8.

    Raises:
        UnreadableSampleError: no image, a damaged or truncated one, or one whose header claims absurdly many pixels
            (Pillow's limit against decompression bombs, `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    with _opened(source) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in _SIXTEEN_BITS:  # Pillow would cut off all above 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")


def image_size(source: ImageSource) -> tuple[int, int]:
    """Return (height, width) in pixels, as shown, from an image's header alone.

    Raises:
        UnreadableSampleError: as `read_image`, as far as the header tells.
    """
    with _opened(source) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(_ORIENTATION, 1) in range(5, 9) else (height, width)


def video_info(source: VideoSource) -> VideoInfo:
    """Return frames, rate and size of a video; of one in memory, of the frames that it has.

    Raises:
        UnreadableSampleError: as `mm_core.data.video.probe`.
    """
    if not isinstance(source, Video):
        return probe(source)
    frames, _, height, width = source.frames.shape
    return VideoInfo(frames, source.fps, height, width)


def video_frames(source: VideoSource, indices: Sequence[int]) -> Iterator[Tensor]:
    """Yield the chosen frames of a video, each uint8 RGB `[3, H, W]`; of one in memory, all, whatever `indices` say.

    Raises:
        UnreadableSampleError: as `mm_core.data.video.read_frames`.
    """
    if isinstance(source, Video):
        yield from source.frames
    else:
        yield from read_frames(source, indices, threads=1)  # loader workers share the cores already


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """Open an image lazily; what Pillow raises inside becomes an `UnreadableSampleError`."""
    if isinstance(source, Image.Image):
        yield source
        return
    name = name_of(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                yield image
    except UnreadableSampleError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise UnreadableSampleError(name, f"its header claims more than {limit} pixels; shrink it") from error
    except UnidentifiedImageError as error:
        raise UnreadableSampleError(name, "it is no image that Pillow can read") from error
    except FileNotFoundError as error:
        raise UnreadableSampleError(name, "there is no such file") from error
    # Pillow's readers of damaged files raise almost anything: OSError, SyntaxError, ValueError, struct.error, IndexError …
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableSampleError(name, f"it cannot be decoded ({reason})") from error
