"""Small videos with known content, and the dataset section of the shipped clips."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from data_helpers import ROOT, TINY, WriteVideo, grey_frame


@pytest.fixture
def write_video(tmp_path: Path) -> WriteVideo:
    """Return a function that writes an H.264 video of `grey_frame`s."""

    def write(
        name: str = "video.mp4",
        frames: int = 12,
        fps: int = 10,
        height: int = 32,
        width: int = 64,
        times: Sequence[int] | None = None,
        rotation: int | None = None,
        movflags: str = "",
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
            options = {"crf": "4", "g": "10", "bf": "2"}
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, fps)
            if rotation is not None:
                stream.set_display_rotation(rotation)
            for index in range(frames):
                frame = av.VideoFrame.from_ndarray(grey_frame(index, height, width), format="rgb24")
                frame.pts = index if times is None else times[index]
                frame.time_base = Fraction(1, fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture
def t2v_fields(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The section of the shipped clips: 8 frames of 48×64 pixels. Paths are seen from the repository."""
    monkeypatch.chdir(ROOT)
    return {
        "basic_parameters": {"data_path": str(TINY / "data.txt"), "data_storage_mode": "combine"},
        "preprocess_parameters": {
            "num_frames": 8,
            "train_fps": 4,
            "max_height": 48,
            "max_width": 64,
            "cfg": 0.0,
        },
        "text_preprocess_methods": [{"method": "basic_clean"}, {"method": "whitespace_clean"}],
        "tokenizer_config": {"from_pretrained": str(TINY / "tokenizer"), "model_max_length": 32},
    }


@pytest.fixture
def make_set(tmp_path: Path, t2v_fields: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Return a function that writes annotations of `tmp_path`'s videos and returns the dataset's fields."""

    def make(items: Sequence[dict[str, Any]], **preprocess: Any) -> dict[str, Any]:
        (tmp_path / "annotation.json").write_text(json.dumps(list(items)), encoding="utf-8")
        (tmp_path / "data.txt").write_text(f"{tmp_path},{tmp_path / 'annotation.json'}\n", encoding="utf-8")
        fields = dict(t2v_fields)
        fields["basic_parameters"] = {
            "data_path": str(tmp_path / "data.txt"),
            "data_storage_mode": "combine",
        }
        settings = {"num_frames": 4, "auto_interval": False, "max_height": 16, "max_width": 32, "cfg": 0.0}
        fields["preprocess_parameters"] = settings | preprocess
        return fields

    return make
