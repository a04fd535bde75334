"""JSON with comments: what is read, where things stand, and what mistakes are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.config import ConfigError, check_file, read_document
from mm_core.config.document import MAX_DEPTH, MAX_VALUES
from mm_core.config.json_reader import parse_json

#: The JSON of the page that describes model files, as it stands there.
SEED = Path(__file__).with_name("seed_model.jsonc")

MISTAKES = [
    ('{"a": 1\n "b": 2}', "1:8: missing ',' between this value and the next key \"b\". Add a comma here"),
    (
        '{"a": {"x": 1} // c\n "b": 2}',
        "1:15: missing ',' between this value and the next key \"b\". Add a comma here",
    ),
    ('{"a": [1 2]}', "1:9: missing ',' between this value and the next value 2. Add a comma here"),
    (
        '{"a": {"b": 1}\n\n',
        "1:15: missing '}' before the file ends: '{' of line 1, column 1 is not closed. Add '}' here",
    ),
    (
        '{"a": [1}',
        "1:9: '}' closes the '[' of line 1, column 7; expected ']'. Write ']', or add the missing one before",
    ),
    ("{,}", "1:2: a comma too many. Remove it"),
    ('{"a": [1,,2]}', "1:10: a comma too many. Remove it"),
    ('{"a" 1}', '1:5: missing \':\' after the key "a". Write "key": value'),
    ('{"a": NaN}', "1:7: NaN is no number that JSON knows. Write a finite number"),
    ('{"a": 1e999}', "1:7: this number is too large"),
    ('{"a": True}', "1:7: True is not JSON. Write true"),
    ('{"a": text}', '1:7: the text text needs double quotes. Write "text"'),
    ("{'a': 1}", "1:2: texts and keys stand in double quotes. Write \" instead of '"),
    ("{a: 1}", '1:2: the key a needs double quotes. Write "a"'),
    ('{"size": {480, 832}}', "1:11: found 480 where a key in double quotes belongs. Use [ ] for a list"),
    ('{"a": 1} x', '1:10: "x" after the end of the top level. Remove it'),
    ('{"a": "x}\n', '1:7: this text has no closing quote on its line. Add " where the text ends; \\n is a line feed'),
    ('{"a": 1,\n "a": 2}', '2:2: duplicate key "a", first given at line 1. Remove one of them'),
    ('{"a": }', "1:6: a value is missing before }"),
    ('{"a": 007}', "1:7: 007 is not a number as JSON writes it. Write 7"),
    ('{"a": .5}', "1:7: .5 is not a number as JSON writes it. Write 0.5"),
    ('{"a": "\\q"}', "1:8: this backslash begins no known escape. Write \\\\ for a backslash, or use /"),
    ('{"a": 1 /* b', "1:9: this comment has no end. Add */ where it ends"),
    ("// only\n", "1:1: the file holds only comments. Write at least {}"),
    ('{"a": 1}, "b": 2}', '1:9: "," after the end of the top level, which \'}\' of line 1, column 8 closed. '
     "Remove it, or that bracket"),
    ('[{"a": 1} {"b": 2}]', "1:10: missing ',' between this value and the next value {. Add a comma here"),
    ('{"a": {"x": 1}{"y": 2}}', "1:15: missing ',' between this value and the next key {. Add a comma here"),
    ('{"a": [1, 2, "b": 3}', "1:12: missing ']' before the key \"b\": '[' of line 1, column 7 is not closed. "
     "Add ']' here"),
    ('{"a": ["b": 3]}', "1:7: a list has no keys such as \"b\". Use { } for an object"),
    ('{"a": "b": 3}', "1:6: missing '{' before \"b\", which a ':' follows as if it were a key. "
     "Add '{' here, or remove the ':' after the text"),
    ('\n"a": 1}', "2:1: missing '{' before the first key \"a\". Add '{' here"),
    ('{"a": {"b": 1} : 2}', "1:16: ':' stands where ',' or a closing bracket belongs"),
    ('{"v": {"a": 1},\n {"b": 2}]}', "1:7: missing '[' before this value: another follows at line 2 without a key. "
     "Add '[' here, and ']' after the last"),
    ('[\n {"a": 1,\n {"b": 2}]', "2:9: missing '}' before {: '{' of line 2, column 2 is not closed. Add '}' here"),
    ('[\n  {\n   "a": 1,\n]', "3:10: missing '}' before ]: '{' of line 2, column 3 is not closed. Add '}' here"),
    ('{"a" = 3}', "1:5: missing ':' after the key \"a\". Write \"key\": value"),
    ('{"a": /data/x}', "1:7: '/' begins no value. Put a text in double quotes; a comment begins with //"),
    ('{# note\n"a": 1}', "1:2: '#' begins no comment in JSON. Write // instead"),
    ('{"a": 1，"b": 2}', "1:8: '，' is not the punctuation of JSON. Write ,"),
    ('{“a”: 1}', "1:2: '“' is not the punctuation of JSON. Write \""),
    ('{"a":\u00a01}', "1:6: this space (U+00A0) is not one that JSON knows. Replace it with an ordinary space"),
    ('{"a": ' + "9" * 5000 + "}", "1:7: a number of 5000 characters has too many digits"),
    ('{"a": "\\ud83d"}', "1:7: an escape in this text is half a character. "
     "Write the character itself, or both halves"),
    ('{"a": -Infinity}', "1:7: -Infinity is no number that JSON knows. Write a finite number"),
    ('{"a": 1\n"b": "x}', "1:8: missing ',' between this value and the next key \"b\". Add a comma here"),
    (
        '{"a": ' + "[" * 100 + "]" * 100 + "}",
        f"1:70: objects and lists are nested more than {MAX_DEPTH} deep",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text[:20] for text, _ in MISTAKES])
def test_mistakes_are_placed_and_mendable(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "m.json")
    assert str(caught.value) == f"m.json:{message}"


FORGOTTEN = """\
{
    "ae": {
        "tiling": {"a": 1},
        "do_sample": false%s
    "list": [
        1,
        2%s
    "last": {
        "deep": {
            "x": [1, 2]%s
    }
}
"""
CLOSED = ("\n    },", "\n    ],", "\n        }")


@pytest.mark.parametrize(
    ("missing", "place"),
    [(0, "4:27: missing '}' before \"list\": '{' of line 2, column 11"),
     (1, "8:10: missing ']' before the key \"last\": '[' of line 6, column 13"),
     (2, "12:24: missing '}' before }: '{' of line 11, column 17")],
)  # fmt: skip
@pytest.mark.parametrize("comma", ["", ","])
def test_a_forgotten_bracket_belongs_where_the_indentation_falls_back(
    missing: int, place: str, comma: str
) -> None:
    ends = [comma if i == missing else text for i, text in enumerate(CLOSED)]
    if missing < 2 and not comma:
        place = place.split(" missing")[0] + " missing ','"  # a comma is missing as well, and comes first
    with pytest.raises(ConfigError) as caught:
        parse_json(FORGOTTEN % tuple(ends), "m.json")
    (found,) = caught.value.findings
    assert f"{found.line}:{found.column}: {found.message}".startswith(place)


def test_too_many_values_are_refused_before_they_fill_the_memory() -> None:
    with pytest.raises(ConfigError, match=f"more than {MAX_VALUES} values") as caught:
        parse_json('{"a": [' + "[],\n" * 2_000_000 + "[]]}", "m.json")
    assert caught.value.findings[0].line == 2 * MAX_VALUES - 2, "the two around them and the key count"


def test_the_seed_pages_own_model_file_has_one_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page forgets the comma between text_encoder and patch; everything else on it is right."""
    monkeypatch.chdir(tmp_path)
    text = SEED.read_text(encoding="utf-8")
    Path("model.json").write_text(text, encoding="utf-8")
    (found,) = check_file("model.json")
    assert str(found) == (
        "model.json:58:6 error: missing ',' between this value and the next key \"patch\". Add a comma here"
    )
    lines = text.split("\n")
    assert lines[57] == "    }"
    assert lines[58].startswith('    "patch": {')
    lines[57] += ","
    Path("model.json").write_text("\n".join(lines), encoding="utf-8")
    findings = check_file("model.json")
    assert read_document("model.json").data["patch"]["get_dist_model_load_from_pt"] is True
    assert [str(finding) for finding in findings if finding.level != "note"] == []


def test_comments_and_trailing_commas_are_read_and_places_stay_true() -> None:
    text = '{\n  // a, "b"\n  "a": "// no /* comment */,}", /* x\n */ "b": [1, {"c": null,},], // end,\n}\n'
    document = parse_json(text, "m.json")
    assert document.data == {"a": "// no /* comment */,}", "b": [1, {"c": None}]}
    assert str(document.key_origin(("a",))) == "m.json:3:3"
    assert str(document.origin(("a",))) == "m.json:3:8"
    assert str(document.key_origin(("b",))) == "m.json:4:5"
    assert str(document.origin(("b", 1, "c"))) == "m.json:4:20"
    assert str(document.origin(("b", 1, "absent"))) == "m.json:4:14", "the object around it"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(JSON, st.sampled_from([None, 2]), st.booleans())
def test_reads_whatever_json_reads(value: object, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    document = parse_json(text, "m.json")
    assert document.data == json.loads(text)
    lines = text.split("\n")
    for path, origin in document.origins.items():
        assert origin.line is not None
        assert origin.column is not None
        found = json.JSONDecoder().raw_decode(
            "\n".join([lines[origin.line - 1][origin.column - 1 :], *lines[origin.line :]])
        )
        node = document.data
        for part in path:
            node = node[part]  # type: ignore[index]
        assert found[0] == node


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{}[],:\"/*\\ntrue1e-. '", max_size=40))
def test_any_text_is_json_or_a_config_error(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        assert parse_json(text, "m.json").data == expected or expected is None
    except ConfigError:
        assert expected is None, "valid JSON was refused"
