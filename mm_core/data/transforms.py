"""What happens to the pixels of a clip: the `trans_type`s of `train_pipeline` as functions, and pipelines.

Every function takes a clip `[T, 3, H, W]`, uint8 in 0…255 or float32, and treats each frame alone: a long
clip can go through in pieces, and the result is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_core.config.transforms import (
    CenterCropResizeVideoConfig,
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
ResizeMode = Literal["resize", "shortside", "longside", "hxw"]


def to_tensor_video(clip: Tensor) -> Tensor:
    """`ToTensorVideo`: uint8 in 0…255 to float32 in [0, 1]."""
    return clip.float().div_(255.0)


def to_unit_range(clip: Tensor) -> Tensor:
    """uint8 in 0…255 to float32 in [-1, 1]: `ToTensorVideo` and `norm_fun` with 0.5 in half the passes over memory.

    To the bit the same, since doubling is exact.
    """
    return torch.div(clip, 127.5).sub_(1.0)


def norm_fun(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`norm_fun`: (x − mean) / std for each channel, in place (`to_tensor_video` has made a new clip)."""
    if (
        len({*mean}) == len({*std}) == 1
    ):  # numbers are many times faster on frames whose channels come last in memory
        return clip.sub_(mean[0]).div_(std[0])
    shape = (1, -1, 1, 1)
    return clip.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def resize(
    clip: Tensor,
    size: Size,
    *,
    interpolation_mode: Interpolation = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """Scale the frames to exactly `size` = (height, width); a uint8 clip stays uint8, rounded.

    In 8 bits and with channels last in memory, as frames are decoded, torch has vectorised kernels.
    """
    if tuple(clip.shape[-2:]) == tuple(size):
        return clip
    smooth = interpolation_mode != "nearest"
    return F.interpolate(
        clip,
        size=size,
        mode=interpolation_mode,
        align_corners=align_corners if smooth else None,
        antialias=antialias and smooth,
    )


def resized(height: int, width: int, mode: ResizeMode, size: Size, area: int) -> Size:
    """Return the (height, width) that `ResizeVideo` gives frames of another size.

    Args:
        mode: "resize" gives `size`; the others keep the ratio: "shortside" covers `size`, "longside" fits
            into it, "hxw" shrinks to at most `area` pixels.
    """
    if mode == "resize":
        return size
    if mode == "hxw":
        return shrink_to_area(height, width, area)
    scales = (size[0] / height, size[1] / width)
    scale = max(scales) if mode == "shortside" else min(scales)
    # In floating point height · (h / height) can be a hair under h.
    return max(1, int(height * scale + 1e-6)), max(1, int(width * scale + 1e-6))


def resize_video(
    clip: Tensor,
    size: Size,
    area: int,
    *,
    mode: ResizeMode,
    skip_low_resolution: bool = False,
    **options: Any,
) -> Tensor:
    """`ResizeVideo`: scale as `resized` says.

    Args:
        skip_low_resolution: with "shortside" and "longside", leave frames that already fit into `size`.
        options: those of `resize`.
    """
    height, width = clip.shape[-2:]
    fits = height <= size[0] and width <= size[1]
    if skip_low_resolution and fits and mode in ("shortside", "longside"):
        return clip
    return resize(clip, resized(height, width, mode, size, area), **options)


def center_crop_resize_video(
    clip: Tensor, size: Size, *, use_short_edge: bool = False, top_crop: bool = False, **options: Any
) -> Tensor:
    """`CenterCropResizeVideo`: cut the largest part that has the ratio of `size`, then scale it to `size`.

    Args:
        use_short_edge: cut the largest square instead.
        top_crop: cut from the top instead of the vertical middle.
        options: those of `resize`.
    """
    height, width = clip.shape[-2:]
    ratio = 1.0 if use_short_edge else size[0] / size[1]
    if height / width > ratio:
        part = (max(1, int(width * ratio + 1e-6)), width)
    else:
        part = (height, max(1, int(height / ratio + 1e-6)))
    return resize(center_crop(clip[..., : part[0], :] if top_crop else clip, part), size, **options)


def center_crop(clip: Tensor, size: Size) -> Tensor:
    """Cut `size` = (height, width) from the middle; neither side may be larger than the clip's."""
    height, width = clip.shape[-2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return clip[..., top : top + size[0], left : left + size[1]]


def align(clip: Tensor, stride: int) -> Tensor:
    """Cut the sides, from the middle, to multiples of `stride`."""
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
    functions = [_step(step, index, rule) for index, step in enumerate(steps)]
    for index, (first, second) in enumerate(itertools.pairwise(steps)):
        if isinstance(first, ToTensorVideoConfig) and isinstance(second, NormalizeConfig):
            mean, std = _per_channel(second)
            if {*mean, *std} == {0.5}:
                functions[index : index + 2] = [to_unit_range]
            break  # there is one of each
    return partial(_run, functions)


def clip_size(steps: Sequence[TransformConfig] | None, rule: ResolutionRule) -> Callable[[int, int], Size]:
    """Return the function from (height, width) of frames to those of what `build_pipeline`'s makes of them."""
    return rule.size if steps is None else partial(_clip_size, tuple(steps), rule)


def _clip_size(steps: Sequence[TransformConfig], rule: ResolutionRule, height: int, width: int) -> Size:
    for step in steps:
        if isinstance(step, ResizeVideoConfig):
            size, area = _target(step.param.transform_size, rule)
            mode = step.param.mode
            fits = height <= size[0] and width <= size[1]
            if not (step.param.skip_low_resolution and fits and mode in ("shortside", "longside")):
                height, width = resized(height, width, mode, size, area)
        elif isinstance(step, CenterCropResizeVideoConfig):
            height, width = _target(step.param.transform_size, rule)[0]
    return height, width


def _default_steps(rule: ResolutionRule) -> list[Transform]:
    size = (rule.max_height, rule.max_width)
    mode: ResizeMode = "shortside" if rule.force_resolution else "hxw"
    scale = partial(resize_video, size=size, area=rule.max_area, mode=mode, antialias=True)
    cut = partial(center_crop, size=size) if rule.force_resolution else partial(align, stride=rule.hw_stride)
    return [scale, cut, to_unit_range]


def _run(steps: Sequence[Transform], clip: Tensor) -> Tensor:
    for step in steps:
        clip = step(clip)
    # Bicubic scaling overshoots at edges; of 8 bits nothing can be out of range.
    return clip if steps[-1] is to_unit_range else clip.clamp_(-1.0, 1.0)


def _step(step: TransformConfig, index: int, rule: ResolutionRule) -> Transform:
    if isinstance(step, ToTensorVideoConfig):
        return to_tensor_video
    if isinstance(step, NormalizeConfig):
        return _normalize(step, index)
    size, area = _target(step.param.transform_size, rule)
    options = step.param.model_dump(exclude={"transform_size"})
    if isinstance(step, ResizeVideoConfig):
        return partial(resize_video, size=size, area=area, **options)
    return partial(center_crop_resize_video, size=size, **options)


def _target(value: Literal["auto"] | TransformSize | Size, rule: ResolutionRule) -> tuple[Size, int]:
    """The (height, width) and the area that a `transform_size` means."""
    if value == "auto":
        return (rule.max_height, rule.max_width), rule.max_area
    if isinstance(value, TransformSize):
        size = (value.max_height, value.max_width)
        return size, value.max_hxw or size[0] * size[1]
    return (value[0], value[1]), value[0] * value[1]


def _per_channel(step: NormalizeConfig) -> tuple[list[float], list[float]]:
    mean, std = (
        [v] * 3 if isinstance(v, int | float) else list(v) for v in (step.param.mean, step.param.std)
    )
    return mean, std


def _normalize(step: NormalizeConfig, index: int) -> Transform:
    mean, std = _per_channel(step)
    low = min(-m / s for m, s in zip(mean, std, strict=True))
    high = max((1 - m) / s for m, s in zip(mean, std, strict=True))
    if low < -1 - 1e-6 or high > 1 + 1e-6:
        raise DataError(
            f"train_pipeline.video[{index}] (norm_fun) maps pixels to [{low:.3g}, {high:.3g}], but the "
            "autoencoder takes [-1, 1]; use mean 0.5 and std 0.5"
        )
    return partial(norm_fun, mean=mean, std=std)
