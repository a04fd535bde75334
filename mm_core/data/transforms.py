"""What happens to the pixels of a clip: the `trans_type`s of `train_pipeline` as functions, and pipelines.

Every function takes a clip `[T, 3, H, W]`, uint8 in 0…255 or float32, and treats each frame alone: a long
clip can go through in pieces, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_core.config.transforms import (
    NormalizeConfig,
    ResizeVideoConfig,
    ToTensorVideoConfig,
    TransformConfig,
    TransformSize,
)
from mm_core.data.errors import DataError
from mm_core.data.resolution import ResolutionRule, shrink_to_area

Transform = Callable[[Tensor], Tensor]
Size = tuple[int, int]
Interpolation = Literal["bilinear", "bicubic", "nearest"]


def to_tensor_video(clip: Tensor) -> Tensor:
    """`ToTensorVideo`: uint8 in 0…255 to float32 in [0, 1]."""
    return clip.float().div_(255.0)


def norm_fun(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`norm_fun`: (x − mean) / std for each of the three channels of a float clip."""
    shape = (1, -1, 1, 1)
    return (clip - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def resize(
    clip: Tensor, size: Size, *, interpolation_mode: Interpolation = "bilinear", antialias: bool = True
) -> Tensor:
    """Scale the frames to exactly `size` = (height, width); a uint8 clip stays uint8, rounded."""
    if tuple(clip.shape[-2:]) == tuple(size):
        return clip
    smooth = interpolation_mode != "nearest"
    scaled = F.interpolate(
        clip.float(),
        size=size,
        mode=interpolation_mode,
        align_corners=False if smooth else None,
        antialias=antialias and smooth,
    )
    return scaled.round_().clamp_(0, 255).to(torch.uint8) if clip.dtype == torch.uint8 else scaled


def resize_video(
    clip: Tensor,
    size: Size,
    *,
    mode: Literal["shortside", "resize"] = "shortside",
    interpolation_mode: Interpolation = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """`ResizeVideo`: scale to exactly `size` ("resize"), or keep the ratio and cover it ("shortside")."""
    height, width = clip.shape[-2:]
    if mode == "shortside":
        scale = max(size[0] / height, size[1] / width)
        # In floating point height · (h / height) can be a hair under h.
        size = (int(height * scale + 1e-6), int(width * scale + 1e-6))
    return resize(clip, size, interpolation_mode=interpolation_mode, antialias=antialias)


def center_crop_resize_video(
    clip: Tensor,
    size: Size,
    *,
    top_crop: bool = False,
    interpolation_mode: Interpolation = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """`CenterCropResizeVideo`: cut the largest part that has the ratio of `size`, then scale it to `size`.

    The part is cut from the middle, or with `top_crop` from the top of the horizontal middle.
    """
    height, width = clip.shape[-2:]
    ratio = size[0] / size[1]
    if height / width > ratio:
        part = (max(1, int(width * ratio + 1e-6)), width)
    else:
        part = (height, max(1, int(height / ratio + 1e-6)))
    cut = clip[..., : part[0], :] if top_crop else clip
    return resize(center_crop(cut, part), size, interpolation_mode=interpolation_mode, antialias=antialias)


def center_crop(clip: Tensor, size: Size) -> Tensor:
    """Cut `size` = (height, width) from the middle; neither side may be larger than the clip's."""
    height, width = clip.shape[-2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return clip[..., top : top + size[0], left : left + size[1]]


def shrink_and_align(clip: Tensor, area: int, stride: int) -> Tensor:
    """Keep the ratio: scale down to at most `area` pixels, then cut the sides to multiples of `stride`."""
    height, width = clip.shape[-2:]
    clip = resize(clip, shrink_to_area(height, width, area))
    height, width = clip.shape[-2:]
    return center_crop(clip, (height // stride * stride, width // stride * stride))


def build_pipeline(steps: Sequence[TransformConfig] | None, rule: ResolutionRule) -> Transform:
    """Return the function from frames, uint8 `[T, 3, H, W]`, to a clip, float32 `[T, 3, h, w]` in [−1, 1].

    Args:
        steps: `train_pipeline.video`. None: scale with antialiasing, cut from the middle, bring into [−1, 1];
            with `force_resolution` to exactly `max_height` × `max_width`, else keeping the ratio.
        rule: `"transform_size": "auto"` stands for its `max_height` × `max_width`.

    Raises:
        DataError: the steps would not give values in [−1, 1], or are out of order.
    """
    if steps is None:
        return partial(_run, _default_steps(rule))
    for kind, name in ((ToTensorVideoConfig, "ToTensorVideo"), (NormalizeConfig, "norm_fun")):
        count = sum(isinstance(step, kind) for step in steps)
        if count != 1:
            raise DataError(
                f"train_pipeline.video has {count} steps {name}, but needs one: the autoencoder takes values "
                "in [-1, 1], which ToTensorVideo and then norm_fun with mean 0.5 and std 0.5 make"
            )
    names = [step.trans_type for step in steps]
    if names.index("norm_fun") < names.index("ToTensorVideo"):
        raise DataError("train_pipeline.video has norm_fun before ToTensorVideo; put it after")
    return partial(_run, [_step(step, index, rule) for index, step in enumerate(steps)])


def _default_steps(rule: ResolutionRule) -> list[Transform]:
    normalize = partial(norm_fun, mean=[0.5] * 3, std=[0.5] * 3)
    if not rule.force_resolution:
        return [
            to_tensor_video,
            partial(shrink_and_align, area=rule.max_area, stride=rule.hw_stride),
            normalize,
        ]
    size = (rule.max_height, rule.max_width)
    return [to_tensor_video, partial(resize_video, size=size), partial(center_crop, size=size), normalize]


def _run(steps: Sequence[Transform], clip: Tensor) -> Tensor:
    for step in steps:
        clip = step(clip)
    # Bicubic scaling overshoots at edges.
    return clip.clamp(-1.0, 1.0).contiguous()


def _step(step: TransformConfig, index: int, rule: ResolutionRule) -> Transform:
    if isinstance(step, ToTensorVideoConfig):
        return to_tensor_video
    if isinstance(step, NormalizeConfig):
        return _normalize(step, index)
    size = _size(step.param.transform_size, rule)
    function: Transform
    if isinstance(step, ResizeVideoConfig):
        function = partial(resize_video, size=size, mode=step.param.mode)
    else:
        function = partial(center_crop_resize_video, size=size, top_crop=step.param.top_crop)
    return partial(function, interpolation_mode=step.param.interpolation_mode, antialias=step.param.antialias)


def _size(value: Literal["auto"] | TransformSize, rule: ResolutionRule) -> Size:
    if isinstance(value, TransformSize):
        return value.max_height, value.max_width
    return rule.max_height, rule.max_width


def _normalize(step: NormalizeConfig, index: int) -> Transform:
    mean, std = (
        [v] * 3 if isinstance(v, int | float) else list(v) for v in (step.param.mean, step.param.std)
    )
    low = min(-m / s for m, s in zip(mean, std, strict=True))
    high = max((1 - m) / s for m, s in zip(mean, std, strict=True))
    if low < -1 - 1e-6 or high > 1 + 1e-6:
        raise DataError(
            f"train_pipeline.video[{index}] (norm_fun) maps pixels to [{low:.3g}, {high:.3g}], but the "
            "autoencoder takes [-1, 1]; use mean 0.5 and std 0.5"
        )
    return partial(norm_fun, mean=mean, std=std)
