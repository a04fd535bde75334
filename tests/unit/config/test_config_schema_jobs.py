"""Schemas of transformers files and of job files, asked by an independent validator; those that are shipped."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from mm_core.config import read_document
from mm_core.config.schema import KINDS, file_schema

ROOT = Path(__file__).resolve().parents[3]
SCHEMAS = ROOT / "examples" / "schemas"


@cache
def validator(name: str) -> Draft202012Validator:
    schema = file_schema(name)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


CORPUS = ROOT / "tests" / "corpus"


@pytest.mark.parametrize("size", ["8B", "30B", "235B"])
def test_a_transformers_file_follows_its_family(size: str) -> None:
    schema = validator("transformers")
    data = json.loads((CORPUS / "qwen3vl" / f"model_{size}.json").read_text(encoding="utf-8"))
    assert schema.is_valid({**data, "$schema": "transformers.schema.json"})
    decoder = data["text_decoder"]
    for wrong in (
        {**data, "los_cfg": {}},
        {**data, "text_decoder": {**decoder, "frezee": True}},
        {**data, "text_decoder": {**decoder, "freeze": 1}},
        {**data, "model_id": "qwen3_lv"},
        {key: value for key, value in data.items() if key != "init_from_hf_path"},
    ):
        assert not schema.is_valid(wrong)


def test_a_job_file_has_every_section() -> None:
    schema = validator("job")
    combined = CORPUS / "qwen3vl_yaml" / "qwen3vl_full_sft_8B.yaml"
    data = yaml.safe_load(combined.read_text(encoding="utf-8"))
    assert schema.is_valid(data)
    tiny = ROOT / "examples" / "tiny" / "wan22-t2v"
    job: Any = {
        "gpt_args": {"lr": 1e-3, "train_iters": 2},
        "model": read_document(tiny / "model.json").data,
        "data": "data.json",
        "fsdp2": {"sharding_size": "auto"},
        "LR": 1e-3,
    }
    assert schema.is_valid(job)
    for wrong in (
        {**data, "gpt_args": {**data["gpt_args"], "micro_batchsize": 1}},
        {**data, "gpt_args": {**data["gpt_args"], "lr": "fast"}},
        {**data, "dat": {}},
        {**job, "fsdp2": {"sharding_sise": 2}},
        {**job, "model": {**job["model"], "predictor": {**job["model"]["predictor"], "num_layer": 2}}},
        {**job, "data": 3},
    ):
        assert not schema.is_valid(wrong)


@pytest.mark.parametrize("name", KINDS)
def test_the_shipped_schema_is_up_to_date(name: str) -> None:
    """`make generated` writes them."""
    shipped = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    assert shipped == file_schema(name)


def test_the_schema_that_an_example_names_is_there() -> None:
    """Editors look for it from the file's own folder, and say nothing if it is not there."""
    told = re.compile(r'\$schema"?[:=] ?"?([\w./-]+\.schema\.json)')
    files = [path for end in ("json", "yaml") for path in (ROOT / "examples").rglob(f"*.{end}")]
    named = [(path, name) for path in files for name in told.findall(path.read_text(encoding="utf-8"))]
    assert len(named) > 30
    assert [str(path) for path, name in named if not (path.parent / name).is_file()] == []
