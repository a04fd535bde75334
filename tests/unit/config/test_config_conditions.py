"""Task, image processor and type of a model must fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FIRST = {"processor_id": "wan_ti2v_processor"}
MASKED = {"processor_id": "wan_i2v_processor"}
CLIP = {**MASKED, "image_encoder": "weights/vae"}


def ask(files: Any, task: str | None, kind: str, processor: dict[str, Any] | None) -> list[str]:
    predictor = files.model["predictor"]
    predictor["model_type"] = kind
    predictor["in_dim"] = 36 if kind in ("i2v", "flf2v", "wan2.2-i2v") else 16
    files.model["task"] = task
    if task is None:
        del files.model["task"]
    if processor is not None:
        files.model["ae"]["i2v_processor"] = processor
    return files.check()


@pytest.mark.parametrize(
    ("kind", "processor"),
    [
        ("ti2v", FIRST),
        ("wan2.2-i2v", MASKED),
        ("wan2.2-i2v", {**MASKED, "last_frame": True}),
        ("i2v", CLIP),
        ("flf2v", {**CLIP, "last_frame": True}),
    ],
)
def test_what_fits(files: Any, kind: str, processor: dict[str, Any]) -> None:
    assert ask(files, "i2v", kind, processor) == []


def test_a_first_frame_may_be_left_out(files: Any) -> None:
    assert ask(files, "t2v", "ti2v", None) == []


@pytest.mark.parametrize(
    ("task", "kind", "processor", "said"),
    [
        ("t2v", "ti2v", FIRST, '"task" is "t2v", but ae has an i2v_processor (wan_ti2v_processor)'),
        (None, "ti2v", FIRST, '"task" is "t2v" by default, but ae has an i2v_processor'),
        ("i2v", "ti2v", None, '"task" is "i2v", but no "i2v_processor" in ae'),
        (
            "t2v",
            "wan2.2-i2v",
            None,
            'nothing makes it of given frames. Add ae.i2v_processor, and "task": "i2v"',
        ),
        (
            "i2v",
            "t2v",
            FIRST,
            "makes first_frame_latents, but predictor (wandit) of model_type t2v takes no such",
        ),
        (
            "i2v",
            "i2v",
            MASKED,
            "needs clip_feature, which i2v_processor (wan_i2v_processor) does not make. Give its image_",
        ),
        (
            "i2v",
            "wan2.2-i2v",
            CLIP,
            "makes clip_feature, but predictor (wandit) of model_type wan2.2-i2v takes no such",
        ),
        (
            "i2v",
            "flf2v",
            CLIP,
            "needs a last frame, but i2v_processor (wan_i2v_processor) gives none. Give its last_frame",
        ),
        (
            "i2v",
            "i2v",
            {**CLIP, "image_encoder": "weights/clip"},
            'image_encoder is "weights/clip": there is no such folder',
        ),
    ],
)
def test_what_does_not(
    files: Any, task: str | None, kind: str, processor: dict[str, Any] | None, said: str
) -> None:
    found = ask(files, task, kind, processor)
    assert len(found) == 1, found
    assert said in found[0]
    assert found[0].startswith("model.json:")


def test_first_frames_that_nobody_looks_at_are_noted(files: Any, tmp_path: Path) -> None:
    pipeline = files.data["dataset_param"]["preprocess_parameters"]["train_pipeline"]
    pipeline["first_frame_vae"] = [{"trans_type": "ResizeVideo", "param": {"transform_size": "auto"}}]
    notes = [str(finding) for finding in files.findings() if '"first_frame_vae"' in finding.message]
    assert len(notes) == 1
    assert " note: " in notes[0]
    assert "given no first frame" in notes[0]
    assert ask(files, "i2v", "ti2v", FIRST) == []
    assert not any("first_frame_vae" in finding.message for finding in files.findings())
