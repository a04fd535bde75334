"""Sections that this version checks and cannot build: ids that only a config class knows, sections inside sections, and
values that are not available yet.
"""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from mm_core.config import NoEffect, NotYet, SectionModel, check_file
from mm_core.config.findings import Finding, unavailable_is_error
from mm_core.config.json_reader import parse_json
from mm_core.config.parts import find_part, resolve
from mm_core.config.section import check_section, nested_sections
from mm_registry import default_manager
from mm_registry.errors import UnknownIdError


class Section(SectionModel):
    mode: Annotated[str, NotYet("plain", "simple", reason="it is to come")] = "plain"
    sizes: Annotated[tuple[int, ...] | None, NotYet(None, (), reason="it is to come")] = None
    on: Annotated[bool, NotYet(False, reason="it is to come")] = False
    kind: Annotated[str, NotYet("a", reason="it is to come", unless=("enable", False))] = "a"
    enable: bool = False
    chunk: Annotated[int, Field(ge=1), NoEffect("all at once", when=("mode", "plain"))] = 8


def check(text: str) -> list[str]:
    document = parse_json(text, "m.json")
    return [str(finding) for finding in check_section(Section, document, label="part").findings]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"mode": "simple", "sizes": [], "on": false}', []),
        (
            '{"mode": "x"}',
            ['m.json:1:10 warning: "mode" is "x": it is to come; this version cannot run it. '
             'Available: "plain", "simple"'],
        ),
        (
            '{"sizes": [1]}',
            ['m.json:1:11 warning: "sizes" is [1]: it is to come; this version cannot run it. It runs without the key'],
        ),
        ('{"on": 1}', ['m.json:1:8 error: "on" is 1, expected true or false. Write true']),
        ('{"kind": "b"}', []),
        (
            '{"kind": "b", "enable": true}',
            ['m.json:1:10 warning: "kind" is "b": it is to come; this version cannot run it. Available: "a"'],
        ),
        ('{"chunk": 4}', ['m.json:1:2 note: "chunk" has no effect here: all at once']),
        ('{"chunk": 4, "mode": "simple"}', []),
        ('{"chunk": 0}', ['m.json:1:11 error: "chunk" is 0: must be at least 1']),
    ],
)  # fmt: skip
def test_what_is_said(text: str, said: list[str]) -> None:
    assert check(text) == said


def test_constructors_get_what_does_something() -> None:
    assert Section().effective() == {"mode": "plain", "kind": "a", "enable": False}
    given = Section.model_validate({"mode": "simple", "sizes": [1], "on": True, "chunk": 4}).effective()
    assert given == {"mode": "simple", "sizes": (1,), "on": True, "kind": "a", "enable": False, "chunk": 4}


def test_a_marker_needs_a_value() -> None:
    with pytest.raises(ValueError, match="at least one"):
        NotYet(reason="x")


def test_in_a_job_it_is_an_error() -> None:
    found = [Finding("warning", "not-available", "x"), Finding("warning", "legacy-key", "y")]
    assert [finding.level for finding in unavailable_is_error(found)] == ["error", "warning"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"processor_id": "wan_i2v_processor", "i2v_vae_encod_tiling": False},
         'unknown key "i2v_vae_encod_tiling" in ae.i2v_processor (wan_i2v_processor). '
         'Did you mean "i2v_vae_encode_tiling"?'),
        ({"i2v_vae_encode_tiling": False}, 'ae.i2v_processor needs "processor_id". Add "processor_id"'),
        ({"processor_id": ["x"]}, '"processor_id" is ["x"], expected an id in quotes'),
        ({"processor_id": "cogvideox"}, "no installed distribution offers the i2v processor 'cogvideox'"),
        ({"processor_id": "wan_i2v_processor", "image_encoder": ""}, '"image_encoder" is "": must have at least 1'),
        ("wan_i2v_processor", '"i2v_processor" is "wan_i2v_processor", expected an object'),
    ],
)  # fmt: skip
def test_a_section_inside_a_section_is_checked(files: Any, section: Any, said: str) -> None:
    files.model["ae"]["i2v_processor"] = section
    files.model["task"] = "i2v"
    files.write()
    errors = [finding for finding in check_file("model.json") if finding.level == "error"]
    assert len(errors) == 1
    assert errors[0].message.startswith(said.split(". Did")[0].split(". Add")[0])
    assert said in errors[0].text
    assert errors[0].path.startswith("ae.i2v_processor")


@pytest.mark.parametrize("which", ["load_video_features", "load_text_features"])
def test_stored_features_need_no_encoder(files: Any, which: str) -> None:
    section = {"load_video_features": "ae", "load_text_features": "text_encoder"}[which]
    del files.model[section]
    files.write()
    assert [f"{f.path} {f.message}" for f in check_file("model.json") if f.level == "error"] == [
        f'{section} model.json needs "{section}"'
    ]
    files.model[which] = True
    files.write()
    assert not [finding for finding in check_file("model.json") if finding.level == "error"]
    assert [text for text in files.check() if which in text and " error: " in text]


def _classes(cls: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    if cls not in seen:
        seen.add(cls)
        for field in cls.model_fields.values():
            for nested in nested_sections(field.annotation):
                _classes(nested, seen)
    return seen


def test_every_key_is_described() -> None:
    """The reference and the schemas are made from the descriptions."""
    from mm_core.config.component import IdKeys, WeightKeys
    from mm_core.config.kinds import CLASSES

    manager = default_manager()
    ours = ("mmzoo-core", "mmzoo-plugin-wan22", "mmzoo-plugin-qwen3vl")
    roots: list[Any] = [*CLASSES.values(), IdKeys, WeightKeys]
    roots += [manager.load(spec) for spec in manager.specs("mm_core.configs") if spec.distribution in ours]
    seen: set[type[BaseModel]] = set()
    for root in roots:
        _classes(root, seen)
    assert len(seen) > 40
    bare = [
        f"{cls.__name__}.{name}"
        for cls in seen
        for name, field in cls.model_fields.items()
        if not (field.description or "").strip().endswith(".") or len(field.description or "") > 260
    ]
    assert sorted(bare) == []
    assert [cls.__name__ for cls in seen if not (cls.__doc__ or "").strip()] == []


def test_an_id_that_only_a_config_class_knows_is_told() -> None:
    """A plugin may check the keys of what it cannot build yet."""

    class WithoutProcessors:
        def __getattr__(self, name: str) -> Any:
            return getattr(default_manager(), name)

        def resolve(self, group: str, name: str) -> Any:
            raise UnknownIdError(f"nobody offers {name}", group=group, id=name)

    document = parse_json('{"ae": {"i2v_processor": {"processor_id": "wan_i2v_processor"}}}', "m.json")
    part, found = find_part(document, "p", "i2v_processor", ("ae", "i2v_processor"), "processor_id")
    assert part is not None
    assert not found
    manager: Any = WithoutProcessors()
    resolved, findings = resolve(part, document, manager)
    assert resolved is not None
    assert resolved.spec is not None
    assert [(finding.level, finding.code) for finding in findings] == [("warning", "not-available")]
    assert "checks the keys of this i2v processor, and cannot build it yet" in findings[0].message
