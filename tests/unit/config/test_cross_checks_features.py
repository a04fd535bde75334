"""What a job says of stored features must be what the folder holds, and what the job's encoders would make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import check_training_job, parse_train_flags
from mm_core.config.component import ComponentConfig
from mm_core.config.features import fingerprint, read_index
from mm_registry.errors import UserError
from mm_registry.spec import EntrySpec

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "examples/tiny/wan22-t2v"
BASIC = "data.dataset_param.basic_parameters"
LATENTS = {"dtype": "float32", "shape": [24, 4, 18, 24]}
PROMPT = {"dtype": "float32", "shape": [None, 64]}


def index(folder: Path, **changes: Any) -> str:
    """An index of features of the tiny job, made by encoders that its model file does not describe."""
    data = {
        "format": "mm-features", "version": 1, "plan": "0", "samples": 0, "empty": None,
        "video": {"encoders": {}, "settings": {"num_frames": 8}, "tensors": {"latents": LATENTS}},
        "text": {"encoders": {}, "settings": {"model_max_length": 32, "length": 32}, "tensors": {"prompt": PROMPT}},
        **changes,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(data))
    return str(folder / "index.json")


def said(monkeypatch: pytest.MonkeyPatch, path: str, *more: str) -> list[str]:
    """Errors about a job that reads all from a folder, whose model file has no encoders."""
    monkeypatch.chdir(ROOT)
    flags = parse_train_flags([
        "--mm-model", str(TINY / "model.json"), "--mm-data", str(TINY / "data.json"), f"{BASIC}.data_path={path}",
        f"{BASIC}.data_storage_mode=sorafeatured", "model.load_video_features=true", "model.load_text_features=true",
        "model.ae=null", "model.text_encoder=null", *more,
    ])  # fmt: skip
    return [
        finding.text.replace(path, "INDEX")
        for finding in check_training_job(flags)
        if finding.level == "error"
    ]


def test_what_fits_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        said(monkeypatch, index(tmp_path), "data.dataset_param.tokenizer_config.from_pretrained=nowhere")
        == []
    )


VIDEO: dict[str, Any] = {"encoders": {}, "settings": {"num_frames": 9}, "tensors": {"latents": LATENTS}}
OTHER_PREDICTOR = (
    "Make the features again with this model file's encoders, or give the predictor that they are for"
)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "a half is missing": (
        {"text": None}, (),
        "load_text_features is true, but INDEX has no embeddings of captions. Write false, or make them with "
        "`mm extract-features --what text`",
    ),
    "a half is not wanted": (
        {}, ("model.load_video_features=false", 'model.ae={"model_id": "haar_video"}'),
        "load_video_features is false, but INDEX has latents. Write true",
    ),
    "other settings": (
        {"video": VIDEO}, (),
        "num_frames is 8, but the features in INDEX were made with 9. Write that, or make them again with "
        "`mm extract-features`",
    ),
    "other channels": (
        {"video": {**VIDEO, "settings": {}, "tensors": {"latents": {**LATENTS, "shape": [16, 4, 18, 24]}}}}, (),
        f"predictor (wandit) takes 24 channels of latents, but those in INDEX have 16. {OTHER_PREDICTOR}",
    ),
    "a condition that is not taken": (
        {"video": {**VIDEO, "settings": {}, "tensors": {"latents": LATENTS, "conditions.clip_feature": LATENTS}}}, (),
        f"predictor (wandit) takes no clip_feature, which INDEX has. {OTHER_PREDICTOR}",
    ),
    "another encoder": (
        {"video": {**VIDEO, "settings": {}, "encoders": {"ae": "other"}}},
        ('model.ae={"model_id": "haar_video"}',),
        "the features in INDEX were made by another ae (haar_video): section or weights differ. Make them again with "
        "`mm extract-features`, or give the section and the weights of then",
    ),
    "an old format": (
        {"version": 0}, (),
        "INDEX: has version 0 of the format, and this installation reads 1; make the features again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_told(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, more, expected = CASES[case]
    assert said(monkeypatch, index(tmp_path, **changes), *more) == [expected]


def test_features_need_a_dataset_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(TINY / "data.txt")
    (told,) = said(monkeypatch, path, f"{BASIC}.data_storage_mode=combine", "model.load_text_features=false",
                   'model.text_encoder={"model_id": "UMT5", "init": "random", "config": {"d_model": 64}}')  # fmt: skip
    assert told.startswith(
        "load_video_features is true, but the samples of data_path are videos and captions. Make features"
    )


def test_another_file_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"metadata": {}}')
    with pytest.raises(
        UserError, match=r"is no index of stored features; `mm extract-features` writes one, index.json, as"
    ):
        read_index(tmp_path / "index.json")


def test_an_encoder_is_known_by_what_it_holds_and_not_by_its_place(tmp_path: Path) -> None:
    def print_of(folder: Path, **fields: Any) -> str:
        spec = EntrySpec("UMT5", "mm_core.text_encoder_models", "m:c", "d", "1", "")
        return fingerprint(
            ComponentConfig("text_encoder", "UMT5", spec, fields=fields, from_pretrained=str(folder))
        )

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3_000_000))
    one, two = (print_of(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert print_of(tmp_path / "one", output_key="other") != one
    (tmp_path / "two/model.safetensors").write_bytes(bytes(1_500_000) + b"1" * 200_000 + bytes(1_300_000))
    assert print_of(tmp_path / "two") != one
