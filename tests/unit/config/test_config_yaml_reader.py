"""YAML: values, places, and what mistakes are called."""

from __future__ import annotations

import pytest

from mm_core.config import ConfigError
from mm_core.config.document import MAX_VALUES
from mm_core.config.yaml_reader import parse_yaml


def test_values_and_places() -> None:
    text = (
        "lr: 1e-5\nn: 8\nflag: yes\nwhen: 12:30:00\nquoted: '1e-5'\nbase: &b {p: 1}\nuse:\n  <<: "
        "*b\n  q: [a, ~]\n"
    )
    document = parse_yaml(text, "f.yaml")
    assert document.data == {
        "lr": 1e-5,
        "n": 8,
        "flag": True,
        "when": "12:30:00",
        "quoted": "1e-5",
        "base": {"p": 1},
        "use": {"p": 1, "q": ["a", None]},
    }
    assert str(document.origin(("n",))) == "f.yaml:2:4"
    assert str(document.key_origin(("use", "q"))) == "f.yaml:9:3"
    assert str(document.origin(("use", "q", 1))) == "f.yaml:9:10"
    assert str(document.origin(("use", "p"))) == "f.yaml:6:14", "merged keys stand where the anchor is"


MISTAKES = [
    ("a: 1\na: 2", 'f.yaml:2:1: duplicate key "a", first given at line 1. Remove one of them'),
    ("a:\n\t- b", "f.yaml:2:1: a tab cannot indent a line. Indent with spaces, not tabs"),
    ("a: 1\nb:2\nc: 3", "f.yaml:2:1: this line is no key: value. Write ': ' after the key, with the space"),
    ("a: [1, 2\n\nb: 3", "f.yaml:1:9: missing ',' or ']': '[' of line 1, column 4 is not closed. "
     "Add ']' here, or a comma"),
    ("a: {b: [", "f.yaml:2:1: the file ends before a bracket is closed. Add the closing bracket"),
    ("a: 'x\nb: 2\n", "f.yaml:1:4: this text has no closing quote. Add the quote where it ends"),
    ("a:\n  b: 1\n c: 2", "f.yaml:3:2: this does not continue the object of line 1. "
     "Check the indentation of this line against the lines around it"),
    ("a: b: c", "f.yaml:1:5: ': ' is not allowed here. "
     "Put a text that holds ': ' in quotes, or check the indentation"),
    ("a: @x", 'f.yaml:1:4: "@" cannot begin a value. Put the text in quotes'),
    ("a: [*.b]", "f.yaml:1:6: '*' begins an alias of YAML. "
     "Quote a pattern that stands in a list: ['predictor.blocks.{*}']"),
    ("a: 1\n---\nb: 2", "f.yaml:2:1: a second document begins here; a configuration is one. "
     "Remove this line, or what follows"),
    ("b: &b {x: 1}\n<<: *b\n<<: *b", 'f.yaml:3:1: duplicate key "<<", first given at line 2. '
     "Write one: <<: [*first, *second]"),
    ("a:\n  <<: {x: 1, x: 2}", 'f.yaml:2:14: duplicate key "x", first given at line 2. Remove one of them'),
    ("a: 010", "f.yaml:1:4: 010 is 8 to YAML (octal digits after the 0). Write 8, or 10 if that is meant"),
    ("a: 1e999", "f.yaml:1:4: 1e999 is not a finite number. Write a finite number"),
    ("a: .NaN", "f.yaml:1:4: .NaN is not a finite number. Write a finite number"),
    ("a: !!float nan", "f.yaml:1:4: nan is not a finite number. Write a finite number"),
    ("a: " + "9" * 5000, "f.yaml:1:4: a number of 5000 characters has too many digits"),
    ("a: !!int x", 'f.yaml:1:4: "x" is no int'),
    ("password: !!int hunter2", 'f.yaml:1:11: "***" is no int'),
    ("a: &x\n  <<: *x", "f.yaml:1:4: an alias contains itself"),
    ("# 中文\na: \x01", "f.yaml:2:4: a character that YAML does not allow (control characters are not allowed)"),
    ("a: 1\nx: \0", "f.yaml:2:4: a character that YAML does not allow (control characters are not allowed)"),
    ("a: !<tag:yaml.org,2002:python/name:os.system> x", "f.yaml:1:4: the tag "
     "tag:yaml.org,2002:python/name:os.system is not accepted: only plain data is read. Remove it"),
    ("!!python/object/new:os.system {a: 1}", "f.yaml:1:1: the tag "
     "tag:yaml.org,2002:python/object/new:os.system is not accepted: only plain data is read. Remove it"),
    ("a: !!python/object/apply:os.system ['x']", "f.yaml:1:4: the tag "
    "tag:yaml.org,2002:python/object/apply:os.system "
     "is not accepted: only plain data is read. Remove it"),
    ("a: &x [*x]", "f.yaml:1:4: an alias contains itself"),
    ("a: *u", "f.yaml:1:4: the alias *u is not defined. Define it with &name before this line"),
    ("a: .inf", "f.yaml:1:4: .inf is not a finite number. Write a finite number"),
    ("# only", "f.yaml:1:1: the file holds only comments. Write at least one key: value"),
    ("x: " + "[" * 100, "f.yaml:1:67: objects and lists are nested more than 64 deep"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text[:12] for text, _ in MISTAKES])
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value) == message


def test_values_that_yaml_1_1_reads_otherwise_than_people_do() -> None:
    text = "a: 1e-5\nb: 1.5e5\nc: .5e3\nd: 1_000\ne: 1:30\nf: 2024-01-01\ng: 0x10\nh: on\ni: 'no'\nj: 1_0:30\nk: 08\n"
    assert parse_yaml(text, "f.yaml").data == {
        "a": 1e-5, "b": 1.5e5, "c": 500.0, "d": 1000, "e": "1:30", "f": "2024-01-01", "g": 16, "h": True, "i": "no",
        "j": "1_0:30", "k": "08",
    }  # fmt: skip


def test_a_key_may_override_a_merged_one_and_the_first_of_several_anchors_counts() -> None:
    text = "b: &b {x: 1, y: 1}\nc: &c {x: 2, z: 2}\na:\n  <<: [*b, *c]\n  y: 3\n"
    document = parse_yaml(text, "f.yaml")
    assert document.data["a"] == {"x": 1, "y": 3, "z": 2}
    assert str(document.key_origin(("a", "y"))) == "f.yaml:5:3"


@pytest.mark.timeout(60)
def test_merges_and_values_cannot_multiply_without_limit() -> None:
    chain = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: 1}}" for i in range(1, 3000)]
    with pytest.raises(ConfigError, match="too many"):
        parse_yaml("\n".join(chain), "f.yaml")
    with pytest.raises(ConfigError, match=f"more than {MAX_VALUES} values"):
        parse_yaml("a: [" + "[]," * 1_000_000 + "]", "f.yaml")


def test_aliases_cannot_multiply_without_limit() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="too many or too deeply nested"):
        parse_yaml("\n".join(lines), "f.yaml")


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("text", ["a: [1, 2\nb: }\n", "a: {b: 1\nc: 2\n", "\tq: x\n", "a: *b\n"])
def test_line_ends_of_unicode(end: str, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^f\.yaml:[4-7]:"):
        parse_yaml(end * 4 + text, "f.yaml")
