from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.data.errors import DataError
from mm_core.data.frames import FrameRule


def test_the_whole_video_at_a_lower_rate() -> None:
    rule = FrameRule(num_frames=8, train_fps=4)
    assert rule.choose(24, 12.0, draw=5) == [0, 3, 6, 9, 12, 15, 18, 21]


def test_every_beginning_can_be_drawn() -> None:
    rule = FrameRule(num_frames=4, auto_interval=False)
    begins = {rule.choose(6, 30.0, draw)[0] for draw in range(20)}
    assert begins == {0, 1, 2}
    assert rule.choose(6, 30.0, draw=2) == [2, 3, 4, 5]


def test_frame_interval_counts_when_auto_interval_is_off() -> None:
    assert FrameRule(num_frames=3, auto_interval=False, frame_interval=4).choose(9, 30.0, 0) == [0, 4, 8]
    assert FrameRule(num_frames=3, auto_interval=True, frame_interval=4, train_fps=30).choose(9, 30.0, 0) == [
        0,
        1,
        2,
    ]


def test_nearly_equal_rates_are_equal() -> None:
    assert FrameRule(num_frames=40, train_fps=24).choose(40, 24000 / 1001, 0) == list(range(40))


def test_a_slower_video_repeats_frames() -> None:
    assert FrameRule(num_frames=6, train_fps=24).choose(3, 12.0, 0) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("speed", "total", "expected"),
    [
        (2.0, 16, [0, 2, 4, 6]),
        (2.0, 6, [0, 1, 3, 4]),  # only 1.5 times as fast: four frames must be left
        (2.0, 4, [0, 1, 2, 3]),
        (0.5, 16, [0, 1, 2, 3]),
    ],
)
def test_speed_factor(speed: float, total: int, expected: list[int]) -> None:
    rule = FrameRule(num_frames=4, auto_interval=False, speed_factor=speed)
    assert rule.choose(total, 24.0, draw=0) == expected


def test_short_videos_are_dropped_by_chance_or_cut() -> None:
    rule = FrameRule(num_frames=17, auto_interval=False, drop_short_ratio=0.5, min_num_frames=5)
    assert rule.short_reason(17, 24.0, chance=0.0) is None
    assert rule.short_reason(12, 24.0, chance=0.4) == "12 frames after sampling, num_frames is 17"
    assert rule.short_reason(12, 24.0, chance=0.6) is None
    assert rule.choose(12, 24.0, draw=3) == list(range(9))  # 1 + 2·4
    assert rule.short_reason(4, 24.0, chance=0.6) == "1 usable frames, min_num_frames is 5"


def test_min_num_frames_does_not_refuse_clips_of_full_length() -> None:
    rule = FrameRule(num_frames=8, min_num_frames=29, auto_interval=False)
    assert rule.short_reason(8, 24.0, chance=0.0) is None


@pytest.mark.timeout(10)
@pytest.mark.parametrize("fps", [1e-300, 5e-324, 24.0, 1e300])
def test_absurd_rates_and_lengths_cost_no_time(fps: float) -> None:
    rule = FrameRule(num_frames=4, train_fps=1e6, speed_factor=1.5, drop_short_ratio=0.0)
    for total in (1, 2**31):
        rule.short_reason(total, fps, chance=0.5)
        frames = rule.choose(total, fps, draw=2**64 - 1)
        assert frames == sorted(frames)
        assert 0 <= frames[0] <= frames[-1] < total


@pytest.mark.parametrize(
    ("name", "value"), [("train_fps", 1e300), ("train_fps", 0.0), ("frame_interval", 1e300)]
)
def test_a_step_beyond_reason_is_refused(name: str, value: float) -> None:
    with pytest.raises(DataError, match=rf"preprocess_parameters\.{name} is .* at most 1e\+06"):
        FrameRule(**{name: value})


@settings(max_examples=200)
@given(
    total=st.integers(1, 400),
    fps=st.floats(1, 120),
    num_frames=st.integers(1, 81),
    train_fps=st.floats(1, 60),
    auto=st.booleans(),
    interval=st.integers(1, 5),
    speed=st.floats(0.5, 4),
    draw=st.integers(0, 2**64 - 1),
)
def test_clips_are_ascending_frames_of_the_video(
    total: int,
    fps: float,
    num_frames: int,
    train_fps: float,
    auto: bool,
    interval: int,
    speed: float,
    draw: int,
) -> None:
    rule = FrameRule(
        num_frames=num_frames,
        train_fps=train_fps,
        auto_interval=auto,
        frame_interval=interval,
        speed_factor=speed,
        drop_short_ratio=0.0,
    )
    frames = rule.choose(total, fps, draw)
    assert frames == sorted(frames)
    assert frames[0] >= 0
    assert frames[-1] < total
    if rule.short_reason(total, fps, chance=0.5) is None and rule.count(total, fps) >= num_frames:
        assert len(frames) == num_frames
    else:
        assert len(frames) % 4 == 1
