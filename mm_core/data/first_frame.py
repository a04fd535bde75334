"""The first frame of a clip where `train_pipeline.first_frame_vae` prepares it for itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mm_core.config.transforms import FrameTransformConfig, ResizeVideoConfig, TransformSize
from mm_core.data.errors import DataError
from mm_core.data.transforms import Size, Transform, center_crop_resize_video, resize_video


def first_frame_transform(steps: Sequence[FrameTransformConfig] | None) -> Transform | None:
    """Return the function from a clip's first frame, `[1, 3, H, W]` in [-1, 1], to the one that the model is given, of the
    same size; None if it is the clip's own.

    Args:
        steps: `train_pipeline.first_frame_vae`; `"transform_size": "auto"` is the clip's own size, so that most of them
            change nothing.
    """
    if steps is None or not any(map(_changes, steps)):
        return None
    made = tuple(steps)

    def transform(frame: torch.Tensor) -> torch.Tensor:
        height, width = frame.shape[-2:]
        changed = frame
        for step in made:
            changed = _applied(step, changed, (height, width))
        if changed.shape != frame.shape:
            raise DataError(
                f"train_pipeline.first_frame_vae makes {changed.shape[-2]}×{changed.shape[-1]} of the first frame of a clip "
                f'of {height}×{width}, but they must be equal; write "transform_size": "auto" there'
            )
        return changed.clamp(-1.0, 1.0)  # bicubic scaling overshoots at edges

    return transform


def _changes(step: FrameTransformConfig) -> bool:
    return step.param.transform_size != "auto" or getattr(step.param, "use_short_edge", False)


def _applied(step: FrameTransformConfig, frame: torch.Tensor, own: Size) -> torch.Tensor:
    value, area = step.param.transform_size, None
    if isinstance(value, TransformSize):
        size, area = (value.max_height, value.max_width), value.max_hxw
    else:
        size = own if value == "auto" else (value[0], value[1])
    options = step.param.model_dump(exclude={"transform_size"})
    if isinstance(step, ResizeVideoConfig):
        return resize_video(frame, size, area or size[0] * size[1], **options)
    return center_crop_resize_video(frame, size, **options)
