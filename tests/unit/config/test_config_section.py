"""What a config class accepts, and what it says about the rest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from mm_core.config import Document, Legacy, NoEffect, Only, SectionModel, invalid
from mm_core.config.dtypes import DType
from mm_core.config.findings import Finding
from mm_core.config.json_reader import parse_json
from mm_core.config.section import check_section


class Near(SectionModel):
    kind: Literal["near"]
    metres: float = 1


class Far(SectionModel):
    kind: Literal["far"]
    steps: int = 1


class Section(SectionModel):
    layers: Annotated[int, Field(ge=1)] = 3
    rate: float = 0.5
    deep: bool = False
    size: tuple[int, int, int] = (1, 2, 2)
    area: Literal["auto"] | tuple[int, int] = "auto"
    shards: int | Literal["auto"] | None = None
    norm: Annotated[bool, Only(True, reason="it always normalises")] = True
    gone: Annotated[Any, Only(None, reason="it is not available yet")] = None
    layout: Annotated[str, NoEffect("the backend chooses", quiet_for=("auto",))] = "auto"
    depth: Annotated[int | None, Legacy("layers")] = None
    steps: list[Annotated[Near | Far, Field(discriminator="kind")]] = Field(default_factory=list)
    guidance: float | list[float] = 1.0
    dtype: DType | None = None
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _order(self) -> Section:
        if self.low >= self.high:
            raise invalid("low", f"must be below high ({self.high})")
        return self


def check(text: str) -> list[str]:
    document = parse_json(text, "m.json")
    return [str(finding) for finding in check_section(Section, document, label="part").findings]


GOLDEN = [
    ('{"layres": 4}', 'm.json:1:2 error: unknown key "layres" in part. Did you mean "layers"?'),
    ('{"layers": "4"}', 'm.json:1:12 error: "layers" is "4", expected a whole number. Remove the quotes: 4'),
    ('{"layers": 4.0}', 'm.json:1:12 error: "layers" is 4.0, expected a whole number. Write 4'),
    ('{"layers": true}', 'm.json:1:12 error: "layers" is true, expected a whole number'),
    ('{"layers": 0}', 'm.json:1:12 error: "layers" is 0: must be at least 1'),
    ('{"deep": 1}', 'm.json:1:10 error: "deep" is 1, expected true or false. Write true'),
    ('{"deep": "False"}', 'm.json:1:10 error: "deep" is "False", expected true or false. Remove the '
    'quotes: false'),
    ('{"layout": 3}', 'm.json:1:12 error: "layout" is 3, expected a text in quotes. Put it in quotes: "3"'),
    ('{"size": [1, 2, "2"]}', 'm.json:1:17 error: "size[2]" is "2", expected a whole number. Remove '
    'the quotes: 2'),
    ('{"size": [1, 2]}', 'm.json:1:10 error: "size" is [1, 2]: must have exactly 3 values'),
    ('{"size": [1, 2, 2, 2]}', 'm.json:1:10 error: "size" is [1, 2, 2, 2]: must have exactly 3 values'),
    ('{"area": []}', 'm.json:1:10 error: "area" is [], expected "auto" or a list of 2 values'),
    ('{"shards": "8"}', 'm.json:1:12 error: "shards" is "8", expected a whole number or "auto". '
    'Remove the quotes: 8'),
    ('{"shards": "auo"}', 'm.json:1:12 error: "shards" is "auo", expected a whole number or "auto". '
    'Did you mean "auto"?'),
    ('{"norm": false}', 'm.json:1:10 error: "norm" is false: only true is accepted: it always normalises'),
    ('{"gone": [1]}', 'm.json:1:10 error: "gone" is [1]: it is not available yet'),
    ('{"steps": [{"kind": "near", "metre": 2}]}',
     'm.json:1:29 error: unknown key "metre" in steps[0] of part. Did you mean "metres"?'),
    ('{"steps": [{"kind": "up"}]}', 'm.json:1:21 error: "steps[0]": "kind" must be one of "near", "far"'),
    ('{"steps": [{"kind": "naer"}]}',
     'm.json:1:21 error: "steps[0]": "kind" must be one of "near", "far". Did you mean "near"?'),
    ('{"guidance": [1, "x"]}', 'm.json:1:18 error: "guidance[1]" is "x", expected a number'),
    ('{"dtype": "bf61"}',
     'm.json:1:11 error: "dtype" is "bf61", expected "bf16", "fp16", "fp32" or "fp64". Did you mean "bf16"?'),
    ('{"low": 2}', 'm.json:1:9 error: "low": must be below high (1.0)'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), GOLDEN, ids=[text for text, _ in GOLDEN])
def test_golden_messages(text: str, message: str) -> None:
    assert message in check(text)
    assert sum(" error: " in line for line in check(text)) == 1


def test_all_findings_come_at_once_in_three_levels() -> None:
    text = '{"layout": "tnd",\n"depth": 7,\n"rate": "x",\n"size": 3,\n"unknown": 1}'
    assert check(text) == [
        'm.json:1:2 note: "layout" has no effect here: the backend chooses',
        'm.json:2:1 warning: "depth" is an old spelling of "layers". Write "layers": 7',
        'm.json:3:9 error: "rate" is "x", expected a number',
        'm.json:4:9 error: "size" is 3, expected a list',
        'm.json:5:1 error: unknown key "unknown" in part. Known keys: area, deep, depth, dtype, gone, '
        "guidance, high, "
        "layers, layout, low, norm, rate and 3 more",
    ]


class Broken(SectionModel):
    layers: int = 1

    @model_validator(mode="after")
    def _fail(self) -> Broken:
        raise RuntimeError("no such\ntable")


def test_a_validator_that_fails_is_a_finding_that_names_its_class() -> None:
    checked = check_section(Broken, parse_json('{"layers": 2}', "m.json"), label="ae (broken)")
    assert checked.section is None
    assert [str(finding) for finding in checked.findings] == [
        f"m.json:1:1 error: ae (broken) cannot be checked: {__name__}.Broken failed, RuntimeError: no such "
        "table. This is a defect of the config class rather than of the file; tell its distribution"
    ]


def test_legacy_values_move_and_are_checked_where_they_stand() -> None:
    checked = check_section(Section, Document.from_data({"depth": 7}))
    assert checked.section is not None
    assert checked.section.layers == 7
    assert 'm.json:1:11 error: "depth" is 0: must be at least 1' in check('{"depth": 0}')
    assert any("both" in line for line in check('{"depth": 2, "layers": 2}'))


def test_effective_leaves_out_what_does_nothing() -> None:
    section = Section.model_validate({"depth": 2, "layout": "x", "rate": 1, "steps": [{"kind": "far"}]})
    fields = section.effective()
    assert fields["layers"] == 2
    assert (fields["rate"], type(fields["rate"])) == (1.0, float)
    assert fields["steps"] == [{"kind": "far", "steps": 1}]
    assert not {"layout", "depth"} & set(fields)


def test_quiet_values_and_defaults_say_nothing() -> None:
    assert check('{"layout": "auto", "norm": true, "gone": null, "dtype": "torch.bfloat16"}') == []


def test_the_markers_hold_in_plain_python_too() -> None:
    with pytest.raises(ValidationError, match="it always normalises"):
        Section(norm=False)
    with pytest.raises(ValidationError):
        Section(rate=float("nan"))
    assert Section(size=[3, 4, 5]).size == (3, 4, 5)


def test_a_finding_spells_escape_codes_out() -> None:
    finding = Finding("error", "odd", 'unknown key "\x1b[31mred"', path="ae")
    assert str(finding) == 'ae error: unknown key "\\x1b[31mred"'
