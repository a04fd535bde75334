"""Images that a video begins or ends with: from files to frames of the video's size."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from mm_core.config.document import expanded
from mm_core.data.chat.media import image_size, read_image
from mm_core.data.errors import UnreadableSampleError
from mm_registry.errors import UserError

logger = logging.getLogger(__name__)

Size = tuple[int, int]
_STRETCH = 1.05  # what is stretched by more is told


def read_frames(
    paths: Sequence[str], size: Size, *, crop: bool = False, fitted: bool = False
) -> torch.Tensor:
    """Read images and scale them to one size by Lanczos' filter, as diffusers' pipelines do.

    Args:
        size: (height, width) in pixels.
        crop: cut the largest part of the right aspect ratio from the middle first; else they are stretched.
        fitted: the size is that of `fitting_size`.

    Returns:
        `[N, 3, H, W]` fp32 in [-1, 1].

    Raises:
        UserError: a file is no image.
    """
    return torch.stack([_frame(path, size, crop, fitted) for path in paths])


def fitting_size(path: str, area: int, steps: Size) -> Size:
    """Return the (height, width) of a video that has an image's aspect ratio and at most `area` pixels.

    Args:
        steps: of which height and width have to be multiples.

    Raises:
        UserError: the file is no image, or no such size has so few pixels.
    """
    try:
        height, width = image_size(expanded(path))
    except UnreadableSampleError as error:
        raise UserError(f"image {error}") from error
    sides = (math.sqrt(area * height / width), math.sqrt(area * width / height))
    size = tuple(int(side + 1e-6) // step * step for side, step in zip(sides, steps, strict=True))
    if not all(size):
        raise UserError(
            f"max_hxw {area}: {path} of {height} x {width} pixels has no size of so few, since the model needs heights in "
            f"steps of {steps[0]} and widths in steps of {steps[1]}; raise max_hxw"
        )
    return size[0], size[1]


def _frame(path: str, size: Size, crop: bool, fitted: bool) -> torch.Tensor:
    try:
        image = read_image(expanded(path))
    except UnreadableSampleError as error:
        raise UserError(f"image {error}") from error
    height, width = size
    ratio = (image.width / image.height) / (width / height)
    if crop:
        image = _cropped(image, height / width)
    elif not 1 / _STRETCH < ratio < _STRETCH:
        mend = "crop_for_hw cuts it instead, max_hxw fits the video to it"
        if fitted:
            mend = "the first frame decides the size, in the steps that the model needs, and a larger max_hxw comes nearer"
        logger.warning(
            "%s of %d x %d pixels is stretched to %d x %d; %s",
            path, image.height, image.width, height, width, mend,
        )  # fmt: skip
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)  # [H, W, 3]
    return pixels.permute(2, 0, 1).contiguous() * 2.0 - 1.0


def _cropped(image: Image.Image, ratio: float) -> Image.Image:
    """The largest part from the middle whose height is `ratio` of its width."""
    if image.height > image.width * ratio:
        width, height = image.width, max(1, round(image.width * ratio))
    else:
        width, height = max(1, round(image.height / ratio)), image.height
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
