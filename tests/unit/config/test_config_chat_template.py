"""The chat template of a dataset: an id like any other, checked without importing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import check_file
from mm_core.config.planned_job import load_planned_job
from mm_core.config.schema import file_schema

CORPUS = Path(__file__).resolve().parents[2] / "corpus" / "qwen3vl"


def data_file(folder: Path, template: Any) -> Path:
    data = json.loads((CORPUS / "data_8B.json").read_text())
    data["dataset_param"]["basic_parameters"]["template"] = template
    path = folder / "data.json"
    path.write_text(json.dumps(data, indent=1))
    return path


@pytest.mark.parametrize("template", ["tokenizer", "qwen3_vl", "mmzoo-plugin-qwen3vl/qwen3_vl_nothink"])
def test_ids_that_are_there(template: str, tmp_path: Path) -> None:
    assert not [one for one in check_file(str(data_file(tmp_path, template))) if one.level == "error"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("qwen3vl", "no installed distribution offers the chat template 'qwen3vl'"),
        ("wandit", "'wandit' is a predictor, not a chat template"),
        ("elsewhere/qwen3_vl", "elsewhere offers no chat template 'qwen3_vl'"),
    ],
)
def test_an_unknown_id_is_an_error_where_it_stands(template: str, said: str, tmp_path: Path) -> None:
    path = data_file(tmp_path, template)
    (finding,) = (one for one in check_file(str(path)) if one.level == "error")
    assert said in f"{finding.message}. {finding.suggestion}"
    assert finding.path == "dataset_param.basic_parameters.template"
    assert '"template"' in path.read_text().splitlines()[(finding.line or 0) - 1]
    if template == "qwen3vl":
        assert "Did you mean 'qwen3_vl' (mmzoo-plugin-qwen3vl" in finding.suggestion


def test_what_is_no_id_is_one_finding(tmp_path: Path) -> None:
    findings = [one for one in check_file(str(data_file(tmp_path, 7))) if one.level == "error"]
    assert [one.path for one in findings] == ["dataset_param.basic_parameters.template"]


def test_another_datasets_key_of_that_name_is_its_own(tmp_path: Path) -> None:
    """`t2v` knows no templates, so the key is unknown there, and not an id."""
    data = {
        "dataset_param": {
            "dataset_type": "t2v",
            "basic_parameters": {"data_path": "a.json", "template": "qwen3vl"},
        }
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps(data))
    codes = {one.code for one in check_file(str(path)) if one.path.endswith("template")}
    assert codes == {"unknown-key"}


def test_a_job_has_it_among_its_components(tmp_path: Path) -> None:
    data = data_file(tmp_path, "tokenizer")
    job = load_planned_job(
        [
            "--mm-model",
            str(CORPUS / "model_8B.json"),
            "--mm-data",
            str(data),
            "--micro-batch-size",
            "1",
            "--seq-length",
            "64",
        ]
    )
    template = job.components["chat_template"]
    assert (template.role, template.model_id, template.spec.distribution) == (
        "chat_template",
        "tokenizer",
        "mmzoo-core",
    )
    assert template.path == ("dataset_param", "basic_parameters", "template")
    assert job.resolved()["values"]["data"]["dataset_param"]["basic_parameters"]["template"] == "tokenizer"


def test_schemas_list_the_ids() -> None:
    written = json.dumps(file_schema("data"))
    for name in ("tokenizer", "qwen3_vl_nothink"):
        assert f'"{name}"' in written
