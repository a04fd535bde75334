from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_core.data.resolution import ResolutionRule, shrink_to_area


def test_forced_clips_have_one_size() -> None:
    rule = ResolutionRule(max_height=48, max_width=64)
    assert rule.size(720, 1280) == (48, 64)
    assert rule.size(10, 10) == (48, 64)


@pytest.mark.parametrize(
    ("height", "width", "fits"),
    [(480, 640, True), (480, 960, True), (480, 961, False), (720, 640, True), (721, 640, False)],
)
def test_forced_clips_may_differ_from_the_ratio_by_the_threshold(height: int, width: int, fits: bool) -> None:
    rule = ResolutionRule(max_height=480, max_width=640, hw_aspect_thr=1.5)
    assert (rule.refusal(height, width) is None) is fits
    assert (ResolutionRule(480, 640, hw_aspect_thr=0).refusal(height, width) is None) is fits  # 0 means 1.5


def test_free_clips_keep_their_ratio() -> None:
    rule = ResolutionRule(force_resolution=False, max_hxw=399360, hw_stride=16, hw_aspect_thr=5.0)
    assert rule.size(1080, 1920) == (464, 832)
    assert rule.size(1920, 1080) == (832, 464)
    assert rule.size(480, 640) == (480, 640)  # never enlarged


def test_free_clips_are_refused_for_shape_and_size() -> None:
    rule = ResolutionRule(force_resolution=False, max_hxw=10000, hw_stride=8, hw_aspect_thr=2.0)
    assert rule.refusal(100, 100) is None
    assert (
        rule.refusal(100, 300) == "height / width is 0.33, not within a factor of 2 (hw_aspect_thr) of 1.00"
    )
    assert rule.refusal(40, 40) == "40×40 (from 40×40) has fewer than 2500 pixels (min_hxw)"
    assert rule.refusal(4, 4) == "0×0 (from 4×4): a side is shorter than hw_stride (8)"
    tiny = ResolutionRule(force_resolution=False, max_hxw=1, hw_stride=4)  # min_hxw is 0 then
    assert tiny.refusal(96, 128) == "0×0 (from 96×128): a side is shorter than hw_stride (4)"


def test_the_area_defaults_to_the_largest_sides() -> None:
    rule = ResolutionRule(max_height=48, max_width=64, force_resolution=False)
    assert (rule.max_area, rule.min_area) == (3072, 768)


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    area=st.integers(64, 10**6),
    stride=st.integers(1, 32),
)
def test_free_sizes_stay_within_area_stride_and_original(
    height: int, width: int, area: int, stride: int
) -> None:
    rule = ResolutionRule(force_resolution=False, max_hxw=area, hw_stride=stride)
    new_height, new_width = rule.size(height, width)
    assert new_height % stride == 0 == new_width % stride
    assert new_height <= height
    assert new_width <= width
    assert new_height * new_width <= max(area, height, width)  # a side never shrinks below one pixel
    scaled_height, scaled_width = shrink_to_area(height, width, area)
    if min(scaled_height, scaled_width) > 20:
        assert scaled_height / scaled_width == pytest.approx(height / width, rel=0.06)
