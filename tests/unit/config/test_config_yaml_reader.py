"""YAML: values, places, and what mistakes are called."""

from __future__ import annotations

import pytest

from mm_core.config import ConfigError
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
    ("a:\n\t- b", "f.yaml:2:1: while scanning for the next token: found character that cannot start "
    "any token. "
     "Indent with spaces, not tabs"),
    ("a: !!python/object/apply:os.system ['x']", "f.yaml:1:4: the tag "
    "tag:yaml.org,2002:python/object/apply:os.system "
     "is not accepted: only plain data is read. Remove it"),
    ("a: &x [*x]", "f.yaml:1:4: an alias contains itself"),
    ("a: *u", "f.yaml:1:4: found undefined alias. Define it with &name before this line"),
    ("a: .inf", "f.yaml:1:4: .inf is not a finite number. Write a finite number"),
    ("# only", "f.yaml:1:1: the file holds only comments. Write at least one key: value"),
    ("x: " + "[" * 100, "f.yaml:1:67: objects and lists are nested more than 64 deep"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text[:12] for text, _ in MISTAKES])
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value) == message


def test_aliases_cannot_multiply_without_limit() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="too many or too deeply nested"):
        parse_yaml("\n".join(lines), "f.yaml")
