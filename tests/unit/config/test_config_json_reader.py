"""JSON with comments: what is read, where things stand, and what mistakes are called."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.config import ConfigError
from mm_core.config.document import MAX_DEPTH
from mm_core.config.json_reader import parse_json

MISTAKES = [
    ('{"a": 1\n "b": 2}', "1:8: missing ',' between this value and the next key \"b\". Add a comma here"),
    (
        '{"a": {"x": 1} // c\n "b": 2}',
        "1:15: missing ',' between this value and the next key \"b\". Add a comma here",
    ),
    ('{"a": [1 2]}', "1:9: missing ',' between this value and the next value \"2\". Add a comma here"),
    (
        '{"a": {"b": 1}\n\n',
        "1:15: the file ends before '}': '{' of line 1, column 1 is not closed. Add '}' here",
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
    ('{"a": "x}\n', '1:7: this text has no closing quote on its line. Add " where the text ends'),
    ('{"a": 1,\n "a": 2}', '2:2: duplicate key "a", first given at line 1. Remove one of them'),
    ('{"a": }', "1:6: a value is missing before }"),
    ('{"a": 007}', "1:7: 007 is not a number as JSON writes it. Write 7"),
    ('{"a": .5}', "1:7: .5 is not a number as JSON writes it. Write 0.5"),
    ('{"a": "\\q"}', "1:8: this backslash begins no known escape. Write \\\\ for a backslash, or use /"),
    ('{"a": 1 /* b', "1:9: this comment has no end. Add */ where it ends"),
    ("// only\n", "1:1: the file holds only comments. Write at least {}"),
    (
        '{"a": ' + "[" * 100 + "]" * 100 + "}",
        f"1:70: objects and lists are nested more than {MAX_DEPTH} deep",
    ),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text[:20] for text, _ in MISTAKES])
def test_mistakes_are_placed_and_mendable(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "m.json")
    assert str(caught.value) == f"m.json:{message}"


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
