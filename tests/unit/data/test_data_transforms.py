from __future__ import annotations

from typing import Any

import av
import numpy as np
import pytest
import torch
from data_helpers import CLIPS
from PIL import Image
from pydantic import TypeAdapter

from mm_core.config.transforms import TransformConfig
from mm_core.data.errors import DataError
from mm_core.data.resolution import ResolutionRule
from mm_core.data.transforms import (
    build_pipeline,
    center_crop,
    center_crop_resize_video,
    norm_fun,
    resize,
    resize_video,
    to_tensor_video,
    to_unit_range,
)

RULE = ResolutionRule(max_height=48, max_width=64)
# The order that Wan's published data files use.
WAN: list[dict[str, Any]] = [
    {"trans_type": "ResizeVideo", "param": {"mode": "shortside", "antialias": True}},
    {"trans_type": "ToTensorVideo"},
    {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
    {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": "auto", "antialias": True}},
]


def steps(*entries: dict[str, Any]) -> list[Any]:
    return TypeAdapter(list[TransformConfig]).validate_python(list(entries))


def images(path: Any, count: int = 3) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for _, frame in zip(range(count), container.decode(video=0), strict=False)]


def to_clip(frames: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)


def pillow_clip(frames: list[Image.Image], height: int, width: int) -> torch.Tensor:
    """Frames scaled by Pillow in floating point, in [-1, 1]; `[T, 3, h, w]`."""
    scaled = [
        [
            np.asarray(
                Image.fromarray(np.asarray(channel, dtype=np.float32)).resize(
                    (width, height), Image.Resampling.BILINEAR
                )
            )
            for channel in frame.split()
        ]
        for frame in frames
    ]
    return torch.from_numpy(np.array(scaled)) / 127.5 - 1


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.stem)
def test_the_default_pipeline_agrees_with_pillow(clip: Any) -> None:
    frames = images(clip)
    result = build_pipeline(None, RULE)(to_clip(frames))
    assert result.shape == (3, 3, 48, 64)
    assert result.dtype == torch.float32
    assert -1 <= result.min() < -0.5
    assert 0.5 < result.max() <= 1
    # Scaling in 8 bits rounds twice, after each direction: to one grey level of 1/127.5 in all.
    torch.testing.assert_close(result, pillow_clip(frames, 48, 64), atol=1 / 127.5 + 1e-6, rtol=0)


def test_the_default_pipeline_covers_then_cuts_the_middle() -> None:
    clip = torch.zeros(1, 3, 48, 128, dtype=torch.uint8)
    clip[..., 32:96] = 255  # exactly the middle 64 columns
    assert build_pipeline(None, RULE)(clip).min() == 1
    tall = torch.zeros(1, 3, 192, 128, dtype=torch.uint8)  # scaled to 96×64, middle 48 rows
    tall[..., 48:144, :] = 255
    assert build_pipeline(None, RULE)(tall)[..., 1:-1, :].min() == 1


def test_free_sizes_keep_the_ratio() -> None:
    rule = ResolutionRule(force_resolution=False, max_hxw=3072, hw_stride=8)
    result = build_pipeline(None, rule)(torch.zeros(2, 3, 90, 160, dtype=torch.uint8))
    assert result.shape == (2, 3, *rule.size(90, 160)) == (2, 3, 40, 72)


def test_wans_pipeline_gives_the_wanted_size_and_range() -> None:
    frames = images(CLIPS[0])
    result = build_pipeline(steps(*WAN), RULE)(to_clip(frames))
    assert result.shape == (3, 3, 48, 64)
    torch.testing.assert_close(result, pillow_clip(frames, 48, 64), atol=1 / 127.5 + 1e-6, rtol=0)


def test_scaling_in_floating_point_agrees_with_pillow() -> None:
    frames = images(CLIPS[0])
    scale = {"trans_type": "ResizeVideo", "param": {"mode": "resize", "antialias": True}}
    run = build_pipeline(steps({"trans_type": "ToTensorVideo"}, scale, {"trans_type": "norm_fun"}), RULE)
    torch.testing.assert_close(run(to_clip(frames)), pillow_clip(frames, 48, 64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pipeline", [None, steps(*WAN)], ids=["default", "wan"])
def test_pieces_of_a_clip_give_the_same_as_the_whole(pipeline: Any) -> None:
    clip = to_clip(images(CLIPS[1], count=7))
    run = build_pipeline(pipeline, RULE)
    pieces = torch.cat([run(clip[:2]), run(clip[2:3]), run(clip[3:])])
    torch.testing.assert_close(pieces, run(clip), atol=0, rtol=0)


def test_bicubic_overshoot_stays_in_range() -> None:
    clip = torch.zeros(1, 3, 96, 128, dtype=torch.uint8)
    clip[..., ::32] = 255
    clip[..., 1::32] = 255
    bicubic = {"trans_type": "ResizeVideo", "param": {"interpolation_mode": "bicubic", "mode": "resize"}}
    result = build_pipeline(
        steps({"trans_type": "ToTensorVideo"}, bicubic, {"trans_type": "norm_fun"}), RULE
    )(clip)
    assert result.min() == -1
    assert resize(to_tensor_video(clip), (48, 64), interpolation_mode="bicubic").min() < 0


def test_eight_bits_are_255ths() -> None:
    clip = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    values = norm_fun(to_tensor_video(clip), [0.5] * 3, [0.5] * 3)
    expected = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(16, 16)
    torch.testing.assert_close(values[0, 1].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("half", [0.5, [0.5, 0.5, 0.5]])
def test_the_usual_pair_of_steps_in_one_is_the_same_to_the_bit(half: Any) -> None:
    clip = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    pair = [
        {"trans_type": "ToTensorVideo"},
        {"trans_type": "norm_fun", "param": {"mean": half, "std": half}},
    ]
    expected = norm_fun(to_tensor_video(clip), [0.5] * 3, [0.5] * 3)
    for run in (
        build_pipeline(steps(*pair), RULE),
        build_pipeline(None, ResolutionRule(16, 16)),
        to_unit_range,
    ):
        assert torch.equal(run(clip), expected)
    assert clip.max() == 255  # what was given is left as it was


def test_only_the_usual_mean_and_deviation_are_taken_together() -> None:
    clip = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    param = {"mean": [0.5, 0.25, 0.5], "std": [0.5, 1.0, 1.0]}
    run = build_pipeline(
        steps({"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun", "param": param}), RULE
    )
    assert run(clip)[0, :, 0, 0].tolist() == [1.0, 0.75, 0.5]


def test_norm_fun_is_per_channel() -> None:
    values = norm_fun(torch.full((1, 3, 1, 1), 0.5), [0.0, 0.25, 0.5], [1.0, 0.5, 0.5])
    assert values.flatten().tolist() == [0.5, 0.5, 0.0]


SIZES = [(96, 128), (97, 129), (50, 300), (301, 51), (48, 64), (20, 20)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_modes_of_resize_video(height: int, width: int) -> None:
    def shape(mode: Any, **more: Any) -> tuple[int, int]:
        clip = torch.zeros(1, 3, height, width)
        return tuple(resize_video(clip, (48, 64), 1000, mode=mode, **more).shape[-2:])

    assert shape("resize") == (48, 64)
    cover = shape("shortside")
    assert cover[0] >= 48
    assert cover[1] >= 64
    assert cover[0] == 48 or cover[1] == 64
    inside = shape("longside")
    assert inside[0] <= 48
    assert inside[1] <= 64
    assert inside[0] == 48 or inside[1] == 64
    shrunk = shape("hxw")
    assert shrunk[0] * shrunk[1] <= 1000
    for new in (cover, inside, shrunk):
        assert new[0] / new[1] == pytest.approx(height / width, rel=0.15)
    small = height <= 48 and width <= 64
    assert shape("longside", skip_low_resolution=True) == ((height, width) if small else inside)


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [
        ("auto", "resize", (48, 64)),
        ([20, 30], "resize", (20, 30)),
        ({"max_height": 16, "max_width": 16}, "resize", (16, 16)),
        ({"max_height": 16, "max_width": 16, "max_hxw": 3072}, "hxw", (48, 64)),
        ([20, 30], "hxw", (21, 28)),
    ],
)
def test_transform_sizes(size: Any, mode: str, expected: tuple[int, int]) -> None:
    scale = {"trans_type": "ResizeVideo", "param": {"transform_size": size, "mode": mode}}
    run = build_pipeline(steps({"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun"}, scale), RULE)
    assert run(torch.zeros(1, 3, 96, 128, dtype=torch.uint8)).shape == (1, 3, *expected)


def test_the_short_edge_cuts_a_square() -> None:
    clip = torch.zeros(1, 1, 40, 100)
    clip[..., 30:70] = 1
    assert center_crop_resize_video(clip, (48, 64), use_short_edge=True).min() == 1
    assert center_crop_resize_video(clip, (48, 64)).min() == 0


def test_top_crop_keeps_the_top() -> None:
    clip = torch.zeros(1, 1, 100, 64)
    clip[..., :48, :] = 1
    assert center_crop_resize_video(clip, (48, 64), top_crop=True).min() == 1
    assert center_crop_resize_video(clip, (48, 64)).min() == 0


def test_center_crop_is_centred() -> None:
    clip = torch.arange(5.0).view(1, 1, 1, 5)
    assert center_crop(clip, (1, 3)).flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"trans_type": "norm_fun"}], "0 steps ToTensorVideo"),
        ([{"trans_type": "ToTensorVideo"}], "0 steps norm_fun"),
        ([{"trans_type": "norm_fun"}, {"trans_type": "ToTensorVideo"}], "norm_fun before ToTensorVideo"),
        (
            [
                {"trans_type": "ToTensorVideo"},
                {"trans_type": "norm_fun", "param": {"mean": [0.48, 0.46, 0.41], "std": 0.27}},
            ],
            r"video\[1\] \(norm_fun\) maps pixels to \[-1.78, 2.19\]",
        ),
    ],
)
def test_pipelines_that_would_not_reach_the_autoencoder_s_range(
    entries: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build_pipeline(steps(*entries), RULE)
