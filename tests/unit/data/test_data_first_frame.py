"""`train_pipeline.first_frame_vae`: what the first frame of a clip becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mm_core.config.dataset import TrainPipeline
from mm_core.data.errors import DataError
from mm_core.data.first_frame import first_frame_transform

FRAME = torch.rand(1, 3, 8, 12) * 2 - 1


def made(*steps: dict[str, Any]) -> Any:
    video = [{"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun"}]
    pipeline = TrainPipeline.model_validate({"video": video, "first_frame_vae": list(steps)})
    return first_frame_transform(pipeline.first_frame_vae)


def test_the_clips_own_frame_is_not_made_again() -> None:
    assert first_frame_transform(None) is None
    assert made({"trans_type": "ResizeVideo", "param": {"transform_size": "auto", "mode": "resize"}}) is None
    assert made({"trans_type": "CenterCropResizeVideo"}) is None


def test_steps_are_applied_in_order() -> None:
    down = {"trans_type": "ResizeVideo", "param": {"transform_size": [4, 6]}}
    up = {"trans_type": "ResizeVideo", "param": {"transform_size": "auto", "interpolation_mode": "bicubic"}}
    frame = made(down, up)(FRAME)
    small = torch.nn.functional.interpolate(FRAME, (4, 6), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.interpolate(small, (8, 12), mode="bicubic", align_corners=False)
    assert torch.allclose(frame, expected.clamp(-1, 1), atol=1e-6)
    square = made({"trans_type": "CenterCropResizeVideo", "param": {"use_short_edge": True}})(FRAME)
    part = torch.nn.functional.interpolate(FRAME[..., 2:10], (8, 12), mode="bilinear", align_corners=False)
    assert torch.allclose(square, part, atol=1e-6)


def test_another_size_than_the_clips_is_refused() -> None:
    step = {"trans_type": "ResizeVideo", "param": {"transform_size": [4, 6]}}
    with pytest.raises(DataError, match="makes 4×6 of the first frame of a clip of 8×12"):
        made(step)(FRAME)
    with pytest.raises(ValidationError, match="first_frame_vae"):
        made({"trans_type": "norm_fun"})
