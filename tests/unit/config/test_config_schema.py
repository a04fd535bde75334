"""`mm schema`: what is right passes the schema, and a slip of the keyboard does not."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from mm_core.cli.main import main
from mm_core.config import ConfigError, Legacy, NoEffect, Only, SectionModel, check_file, read_document
from mm_core.config.dtypes import SPELLINGS, short_dtype
from mm_core.config.kinds import Kind, detect_kind
from mm_core.config.schema import KINDS, file_schema
from mm_core.config.schema_components import Component, Made
from mm_core.config.schema_fields import Marked
from mm_registry import PluginManager

ROOT = Path(__file__).resolve().parents[3]
_KINDS = {kind: name for name, kind in KINDS.items()}
_SILENT = {
    "title",
    "description",
    "default",
    "deprecated",
    "$comment",
    "$schema",
    "$defs",
    "discriminator",
    "then",
    "else",
}


def example_files() -> Iterator[Path]:
    """Every configuration file in examples/, told by its keys as `mm check` tells it."""
    for path in sorted(path for end in ("json", "yaml") for path in (ROOT / "examples").rglob(f"*.{end}")):
        try:
            document = read_document(path)
        except ConfigError:  # a list of clips
            continue
        # Folders as the hub has them, of a tokenizer or of a whole model, are no configuration of ours.
        if path.parent.name not in ("tokenizer", "model") and detect_kind(document) in _KINDS:
            yield path


schema_of = cache(file_schema)


def of_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's data, and the schema of its kind."""
    document = read_document(path)
    kind = detect_kind(document)
    assert kind is not None
    return document.data, schema_of(_KINDS[kind])


def mismatches(value: Any, schema: Any, root: dict[str, Any]) -> list[str]:
    """A small validator of the keywords that our schemas have; any other keyword is a failure of the test."""
    if schema in (True, {}):
        return []
    if schema is False:
        return ["nothing is allowed here"]
    said: list[str] = []
    for keyword, wanted in schema.items():
        if keyword not in _SILENT and not _KEYWORDS[keyword](value, wanted, schema, root):
            said.append(f"{keyword} {json.dumps(wanted)[:80]} refuses {str(value)[:80]}")
    return said


def fits(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    return not mismatches(value, schema, root)


def same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_type(value: Any, wanted: str, *_: Any) -> bool:
    return {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "number": number(value),
        "integer": number(value) and value == int(value),
    }[wanted]


def _reference(value: Any, wanted: str, _: Any, root: dict[str, Any]) -> bool:
    return fits(value, root["$defs"][wanted.removeprefix("#/$defs/")], root)


def _additional(value: Any, wanted: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    return not isinstance(value, dict) or all(
        fits(item, wanted, root)
        for key, item in value.items()
        if key not in known and not any(re.search(pattern, key) for pattern in patterns)
    )


def _patterns(value: Any, wanted: Any, _: Any, root: dict[str, Any]) -> bool:
    return not isinstance(value, dict) or all(
        fits(item, schema, root)
        for pattern, schema in wanted.items()
        for key, item in value.items()
        if re.search(pattern, key)
    )


def _if(value: Any, wanted: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    return fits(value, schema["then"] if fits(value, wanted, root) else schema.get("else", True), root)


_KEYWORDS: dict[str, Any] = {
    "type": _is_type,
    "enum": lambda v, w, s, r: any(same(v, one) for one in w),
    "const": lambda v, w, s, r: same(v, w),
    "$ref": _reference,
    "anyOf": lambda v, w, s, r: any(fits(v, one, r) for one in w),
    "oneOf": lambda v, w, s, r: sum(fits(v, one, r) for one in w) == 1,
    "allOf": lambda v, w, s, r: all(fits(v, one, r) for one in w),
    "if": _if,
    "properties": lambda v, w, s, r: not isinstance(v, dict) or all(fits(v[k], w[k], r) for k in w if k in v),
    "additionalProperties": _additional,
    "patternProperties": _patterns,
    "required": lambda v, w, s, r: not isinstance(v, dict) or set(w) <= set(v),
    "prefixItems": lambda v, w, s, r: (
        not isinstance(v, list) or all(fits(one, part, r) for one, part in zip(v, w, strict=False))
    ),
    "items": lambda v, w, s, r: (
        not isinstance(v, list) or all(fits(one, w, r) for one in v[len(s.get("prefixItems", ())) :])
    ),
    "minItems": lambda v, w, s, r: not isinstance(v, list) or len(v) >= w,
    "maxItems": lambda v, w, s, r: not isinstance(v, list) or len(v) <= w,
    "minLength": lambda v, w, s, r: not isinstance(v, str) or len(v) >= w,
    "maxLength": lambda v, w, s, r: not isinstance(v, str) or len(v) <= w,
    "pattern": lambda v, w, s, r: not isinstance(v, str) or re.search(w, v) is not None,
    "minimum": lambda v, w, s, r: not number(v) or v >= w,
    "maximum": lambda v, w, s, r: not number(v) or v <= w,
    "exclusiveMinimum": lambda v, w, s, r: not number(v) or v > w,
    "exclusiveMaximum": lambda v, w, s, r: not number(v) or v < w,
    "multipleOf": lambda v, w, s, r: not number(v) or v % w == 0,
}


# -- files


@pytest.mark.parametrize("path", example_files(), ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_every_example_passes_and_every_typo_in_a_key_that_is_an_error_does_not(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    data, schema = of_file(path)
    assert mismatches(data, schema, schema) == []
    tried = 0
    for place in list(keys(data)):
        spoilt = renamed(data, place)
        file = tmp_path / "spoilt.json"
        file.write_text(json.dumps(spoilt), encoding="utf-8")
        if any(found.code in ("unknown-key", "unknown-id") for found in check_file(str(file))):
            tried += 1
            assert mismatches(spoilt, schema, schema), place
    assert tried >= min(5, len(data))


def keys(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if isinstance(data, dict):
            yield (*path, key)
        yield from keys(value, (*path, key))


def renamed(data: Any, place: tuple[Any, ...]) -> Any:
    spoilt = copy.deepcopy(data)
    node = spoilt
    for part in place[:-1]:
        node = node[part]
    node[f"{place[-1]}x"] = node.pop(place[-1])
    return spoilt


def test_the_job_that_people_bring_passes(files: Any) -> None:
    for name, kind in (("model", "model"), ("data", "data"), ("tools", "tools"), ("inference", "inference")):
        data = read_document(files.folder / f"{name}.json").data
        assert mismatches(data, schema_of(kind), schema_of(kind)) == [], name
    data = read_document(files.folder / "fsdp2.yaml").data
    assert mismatches(data, schema_of("fsdp2"), schema_of("fsdp2")) == []


@pytest.mark.parametrize(
    ("name", "place", "value", "right"),
    [
        ("model", ("predictor", "model_id"), "wandti", False),
        ("model", ("predictor", "model_id"), "mmzoo-plugin-wan22/wandit", True),
        ("model", ("predictor", "num_layers"), "40", False),
        ("model", ("predictor", "qk_norm"), False, False),
        ("model", ("predictor", "in_dim"), 0, False),
        ("model", ("ae", "dtype"), "torch.bfloat16", True),
        ("model", ("ae", "dtype"), "bf17", False),
        ("model", ("text_encoder", "model_id"), "wandit", False),
        ("model", ("enable_encoder_dp",), "yes", False),
        ("model", ("$schema",), "model.schema.json", True),
        ("inference", ("pipeline_class",), "WanPipelin", False),
        ("inference", ("pipeline_config", "input_sise"), [81, 480, 720], False),
        ("inference", ("low_noise_predictor",), {"model_id": "wandit", "num_layer": 2}, False),
        ("inference", ("low_noise_predictor",), {"model_id": "wandit", "num_layers": 2}, True),
        ("data", ("dataset_param", "dataset_type"), "t2w", False),
        ("tools", ("profile", "enabel"), True, False),
    ],
)
def test_one_value_changed(files: Any, name: str, place: tuple[str, ...], value: Any, right: bool) -> None:
    data = getattr(files, name)
    node = data
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
    assert fits(data, schema_of(name), schema_of(name)) is right


def test_several_text_encoders_pass(files: Any) -> None:
    files.model["text_encoder"] = [files.model["text_encoder"]] * 2
    assert fits(files.model, schema_of("model"), schema_of("model"))
    files.model["text_encoder"] = []
    assert not fits(files.model, schema_of("model"), schema_of("model"))


@pytest.mark.parametrize("name", KINDS)
def test_a_schema_is_whole(name: str) -> None:
    schema = schema_of(name)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    # The keys of a transformers file are its family's: each family's definition is closed.
    closed = [schema] if name != "transformers" else [schema["$defs"]["transformers_model.qwen3_vl"]]
    assert [part["additionalProperties"] for part in closed] == [False]
    text = json.dumps(schema)
    referred = set(re.findall(r'"#/\$defs/([^"]+)"', text))
    assert referred == set(schema.get("$defs", {}))
    if name not in ("tools",):
        assert "description" in next(iter(schema["properties"].values()))


@pytest.mark.slow
def test_every_schema_is_one_for_jsonschema_too(files: Any) -> None:
    """The small validator above, checked by the real one where it is installed."""
    jsonschema = pytest.importorskip("jsonschema")
    for path in example_files():
        data, schema = of_file(path)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert list(jsonschema.Draft202012Validator(schema).iter_errors(data)) == [], path
    files.model["predictor"]["num_layer"] = 3
    assert not jsonschema.Draft202012Validator(schema_of("model")).is_valid(files.model)


class _Needy(SectionModel):
    width: int


def test_what_is_required_of_a_section() -> None:
    manager = PluginManager()
    manager.register("mm_core.predictor_models", "toy", object)
    defs = file_schema("model", manager=manager)["$defs"]
    # A hook may fill what is missing, so the distribution's own keys are not asked for.
    for id, required in (("ltx_dit", ["model_id"]), ("wandit", ["model_id", "width"])):
        spec = manager.resolve("mm_core.predictor_models", id)
        toy = Component("predictor", (id,), spec, _Needy)
        assert Made([_Needy], [toy], manager).section(toy)["required"] == required
    # Without a config class nothing is known but the core's keys.
    assert defs["predictor.toy"].get("additionalProperties", True) is True
    assert {"model_id", "from_pretrained", "init", "dtype"} <= set(defs["predictor.toy"]["properties"])
    data = file_schema("data", manager=manager)["$defs"]["dataset.t2v"]
    assert {"dataset_type", "basic_parameters", "tokenizer_config"} == set(data["required"])


# -- markers


class _Toy(SectionModel):
    """A section with a key
    of each kind."""

    width: Annotated[int, Field(ge=1, description="Of the layer.")]
    idle: Annotated[bool, NoEffect("nothing listens to it")] = False
    old_width: Annotated[int | None, Legacy("width")] = None
    norm: Annotated[bool, Only(True, reason="it is always there")] = True
    lora: Annotated[Any, Only(None, reason="there is none")] = None
    mode: Annotated[str | None, Only(None, "a", "b", reason="no others exist")] = None


def test_markers_are_told() -> None:
    schema = _Toy.model_json_schema(schema_generator=Marked)
    told = schema["properties"]
    assert schema["description"] == "A section with a key of each kind."
    assert told["width"] == {"minimum": 1, "type": "integer", "description": "Of the layer."}
    assert (told["idle"]["deprecated"], told["idle"]["description"]) == (
        True,
        "Without effect here: nothing listens to it.",
    )
    assert (told["old_width"]["deprecated"], told["old_width"]["description"]) == (
        True,
        'An old spelling of "width".',
    )
    assert (told["norm"]["enum"], told["lora"]["enum"], told["mode"]["enum"]) == (
        [True],
        [None],
        [None, "a", "b"],
    )
    assert told["lora"]["description"] == "Refused: there is none."
    assert told["mode"]["description"] == 'Only "a" or "b": no others exist.'
    assert fits({"old_width": 3}, schema, schema)  # the newer key is not asked for beside the old one
    assert fits({"width": 3}, schema, schema)
    assert not fits({}, schema, schema)
    assert not fits({"width": 3, "widht": 3}, schema, schema)


def test_every_spelling_of_a_number_format_is_one() -> None:
    assert {short_dtype(name) for name in SPELLINGS} == {"bf16", "fp16", "fp32", "fp64"}
    formats = schema_of("fsdp2")["properties"]["param_dtype"]["enum"]
    assert {"bf16", "torch.float32", None} <= set(formats)
    assert not {"fp16", "half", "torch.float16"} & set(formats)


# -- the command


def test_components_by_role_or_alone(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for what in ("wandit", "predictor/wandit", "mmzoo-plugin-wan22/wandit"):
        assert main(["schema", what]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1] == printed[2]
    assert printed[0]["properties"]["model_id"]["enum"][0] == "wandit"
    assert {"num_layers", "from_pretrained", "dtype"} <= set(printed[0]["properties"])
    assert printed[0]["additionalProperties"] is False
    main(["schema", "WanPipeline"])
    assert "model_id" not in json.loads(capsys.readouterr().out)["properties"]
    main(["schema", "t2v"])
    assert "dataset_type" in json.loads(capsys.readouterr().out)["required"]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("modle", "did you mean `model`?"),
        ("wandti", "did you mean 'wandit'"),
        ("predictor/wandti", "no installed distribution offers the predictor 'wandti'"),
        ("predictor", "write one of its components: predictor/"),
        ("task/diffusion", "a task has no section of its own"),
    ],
)
def test_what_there_is_no_schema_of(what: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", what]) == 2
    assert told in capsys.readouterr().err


def test_output_replaces_only_schemas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model.schema.json"
    assert main(["schema", "model", "--output", str(target)]) == 0
    assert json.loads(target.read_text()) == json.loads(json.dumps(file_schema("model")))
    assert main(["schema", "data", "--output", str(target)]) == 0  # a schema of ours may be replaced
    assert json.loads(target.read_text()) == json.loads(json.dumps(file_schema("data")))
    for content in ('{"predictor": {}}', "no JSON", "[]"):
        (tmp_path / "model.json").write_text(content)
        assert main(["schema", "model", "--output", str(tmp_path / "model.json")]) == 2
        assert "`mm schema` did not write it" in capsys.readouterr().err
        assert (tmp_path / "model.json").read_text() == content
    assert main(["schema", "model", "--output", str(tmp_path / "absent" / "x.json")]) == 2
    assert main(["schema", "model", "--output", str(tmp_path)]) == 2
    assert main(["schema", "model", "--output", "/dev/zero"]) == 2  # which would be read without end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.schema.json"]


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from mm_core.cli.main import main; main(['schema', 'model']); main(['schema', 'inference'])\n"
        "sys.exit(str(sorted({'torch', 'transformers', 'diffusers', 'numpy'} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip() == "[]"


def test_every_kind_that_can_be_checked_has_a_schema() -> None:
    assert set(KINDS.values()) == set(Kind) - {Kind.COMBINED}  # which is a job file
