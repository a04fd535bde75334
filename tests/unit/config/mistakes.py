"""Mistakes that people make in configuration files, drawn at random: what `test_config_mutations.py` spoils files with."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from mm_core.config import Document, Finding
from mm_core.config.origin import KeyPath, dotted


@dataclass(frozen=True)
class Case:
    """A spoilt file.

    Attributes:
        first, last: lines in which the mistake is.
        path: of the key that was spoilt, dotted; empty for what is no key.
    """

    content: str | bytes
    first: int
    last: int
    path: str = ""
    key: str = ""


@dataclass
class Original:
    """A correct file, and what is said about it."""

    name: str
    text: str
    document: Document
    findings: tuple[Finding, ...]

    @property
    def members(self) -> list[KeyPath]:
        """Paths of all keys that are written out, without those that an alias repeats."""
        return [
            path
            for path, origin in self.document.keys.items()
            if isinstance(path[-1], str)
            and "*" not in self.line(origin.line)
            and "&" not in self.line(origin.line)
        ]

    @cached_property
    def plain(self) -> str:
        """The text of JSON with comments and trailing commas as spaces."""
        pattern = r'("(?:\\.|[^"\\\n])*")|//[^\n]*|,(?=\s*(?://[^\n]*\s*)*[}\]])'
        return re.sub(pattern, lambda found: found[1] or " " * len(found[0]), self.text)

    def line(self, number: int | None) -> str:
        return self.text.split("\n")[(number or 1) - 1]

    def offset(self, line: int | None, column: int | None) -> int:
        return sum(len(text) + 1 for text in self.text.split("\n")[: (line or 1) - 1]) + (column or 1) - 1

    def key_span(self, path: KeyPath) -> tuple[int, int]:
        origin = self.document.key_origin(path)
        start = self.offset(origin.line, origin.column)
        word = re.compile(r'"(?:\\.|[^"\\])*"|[^\s:]+').match(self.text, start)
        assert word is not None
        return start, word.end()

    def value_span(self, path: KeyPath) -> tuple[int, int] | None:
        """Return where the value stands; None for those of YAML that take more than their line."""
        origin = self.document.origin(path)
        start = self.offset(origin.line, origin.column)
        if self.name.endswith(".json"):
            return start, json.JSONDecoder().raw_decode(self.plain, start)[1]
        if origin.line != self.document.key_origin(path).line:
            return None
        rest = self.text[start:].split("\n", 1)[0]
        end = re.search(r"\s+#|\s*$", rest)
        assert end is not None
        return start, start + end.start()

    def spoilt(self, start: int, end: int, new: str, path: KeyPath = (), key: str = "") -> Case:
        """Return a case in which the text from `start` to `end` is another."""
        first = self.text.count("\n", 0, start) + 1
        shown = (*path[:-1], key or path[-1]) if path else ()
        name = str(path[-1]) if path else ""
        return Case(
            self.text[:start] + new + self.text[end:], first, first + new.count("\n"), dotted(shown), name
        )

    def valued(self, path: KeyPath, new: str) -> Case | None:
        """Return a case in which a key has another value."""
        span = self.value_span(path)
        return self.spoilt(*span, new, path) if span is not None else None


Mutation = Callable[[Original, random.Random], Case | None]


# -- the mistakes -----------------------------------------------------------------------------------------------


def _quoted(original: Original, word: str) -> str:
    return json.dumps(word) if original.name.endswith(".json") else word


def misspelt_key(original: Original, rng: random.Random) -> Case | None:
    path = rng.choice(original.members)
    key, at = str(path[-1]), rng.randrange(len(str(path[-1])))
    typo = rng.choice([key[:at] + key[at + 1 :], key[:at] + "q" + key[at:], key + key[-1]])
    siblings = original.document.value(path[:-1])
    if not typo or typo in siblings or typo.isupper():
        return None
    return original.spoilt(*original.key_span(path), _quoted(original, typo), path, typo)


def another_type(original: Original, rng: random.Random) -> Case | None:
    path = rng.choice(original.members)
    value = original.document.value(path)
    wrong = ['{"x": 1}', "[[[]]]"]
    if isinstance(value, bool):
        wrong += ['"true"', "1", "[true]"]
    elif isinstance(value, int | float):
        wrong += [f'"{value}"', "true", '"many"']
    elif isinstance(value, str):
        wrong += ["7", "true", "0.5"]
    return original.valued(path, rng.choice(wrong))


def list_for_object(original: Original, rng: random.Random) -> Case | None:
    paths = [path for path in original.members if isinstance(original.document.value(path), dict)]
    if not paths:
        return None
    path = rng.choice(paths)
    span = original.value_span(path)
    if span is None:
        return None
    return original.spoilt(*span, rng.choice(["[]", "[1]", '["a", {}]']), path)


def null_value(original: Original, rng: random.Random) -> Case | None:
    path = rng.choice(original.members)
    return original.valued(path, "null") if original.document.value(path) is not None else None


def not_finite(original: Original, rng: random.Random) -> Case | None:
    words = (
        ("NaN", "Infinity", "-Infinity", "1e999")
        if original.name.endswith(".json")
        else (".nan", ".inf", "1e999")
    )
    return original.valued(rng.choice(original.members), rng.choice(words))


def deep_nesting(original: Original, rng: random.Random) -> Case | None:
    depth = rng.choice([70, 1000, 50_000])
    if rng.random() < 0.5:
        return original.valued(rng.choice(original.members), "[" * depth + "]" * depth)
    return original.valued(rng.choice(original.members), '{"a":' * depth + "1" + "}" * depth)


def long_text(original: Original, rng: random.Random) -> Case | None:
    return original.valued(rng.choice(original.members), '"' + "x" * 1_000_000 + '"')


def long_key(original: Original, rng: random.Random) -> Case | None:
    path = rng.choice(original.members)
    key = "x" * (1_000_000 if original.name.endswith(".json") else 1000)  # YAML allows 1,024 characters
    return original.spoilt(*original.key_span(path), _quoted(original, key), path, key)


def duplicate_key(original: Original, rng: random.Random) -> Case | None:
    path = rng.choice(original.members)
    start, _ = original.key_span(path)
    key = _quoted(original, str(path[-1]))
    if original.name.endswith(".json"):
        case = original.spoilt(start, start, f"{key}: 1,\n", path)
        return Case(case.content, case.last, case.last, case.path, case.key)
    indent = start - original.text.rfind("\n", 0, start) - 1
    if original.text[:start][-indent:].strip(" ") and indent:
        return None  # behind "- "
    case = original.spoilt(start, start, f"{key}: 1\n{' ' * indent}", path)
    return Case(case.content, case.last, case.last, case.path, case.key)


def unknown_word(original: Original, rng: random.Random) -> Case | None:
    path = rng.choice(original.members)
    return original.valued(path, '"zzz"') if isinstance(original.document.value(path), str) else None


def out_of_range(original: Original, rng: random.Random) -> Case | None:
    path = rng.choice(original.members)
    value = original.document.value(path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return original.valued(path, rng.choice(["-1000000000000", "-0.5e9", "-7"]))


def _dropped(mark: str, original: Original, rng: random.Random) -> Case | None:
    """Forget one of `,`, `:`, an opening or a closing bracket of JSON."""
    if not original.name.endswith(".json"):
        return None
    spans = [match.span() for match in re.finditer(r'"(?:\\.|[^"\\])*"', original.text)]
    places = [match.start() for match in re.finditer(f"[{re.escape(mark)}]", original.text)]
    places = [at for at in places if not any(start <= at < end for start, end in spans)]
    at = rng.choice(places)
    case = original.spoilt(at, at + 1, "")
    # What is missing may belong right after the value before, or show at what follows only.
    first = original.text[:at].rstrip(" \n").count("\n") + 1
    last = original.plain[: at + 1].count("\n") + 1
    if mark == "{[":
        last += len(re.match(r"\s*", original.plain[at + 1 :])[0].split("\n")) - 1  # type: ignore[index]
    return Case(case.content, first, last)


def dropped_comma(original: Original, rng: random.Random) -> Case | None:
    return _dropped(",", original, rng)


def dropped_opening(original: Original, rng: random.Random) -> Case | None:
    return _dropped("{[", original, rng)


def dropped_closing(original: Original, rng: random.Random) -> Case | None:
    return _dropped("}]", original, rng)


def dropped_colon(original: Original, rng: random.Random) -> Case | None:
    _, end = original.key_span(rng.choice(original.members))
    if original.name.endswith(".json"):
        return _dropped(":", original, rng)
    case = original.spoilt(end, end + 1, "")
    # A line without its colon goes on in the next one, unless that is indented.
    return Case(case.content, case.first - 1, case.last + 1, case.path)


def tab_indentation(original: Original, rng: random.Random) -> Case | None:
    if original.name.endswith(".json"):
        return None
    starts = [match.start() for match in re.finditer(r"(?m)^ +(?=[\w-])", original.text)]
    if not starts:
        return None
    at = rng.choice(starts)
    end = at + re.compile(" +").match(original.text, at).end() - at  # type: ignore[union-attr]
    case = original.spoilt(at, end, "\t")
    return Case(case.content, case.first - 1, case.last)


def strange_bytes(original: Original, rng: random.Random) -> Case | None:
    raw = original.text.encode()
    at = rng.randrange(len(raw))
    noise = bytes(rng.choice([0, 1, 27, 128, 255, *b'"\\{}[],:*&!%@`|']) for _ in range(rng.randint(1, 6)))
    line = raw.count(b"\n", 0, at) + 1
    return Case(raw[:at] + noise + raw[at:], line - 1, line + 1)


def truncated(original: Original, rng: random.Random) -> Case | None:
    if not original.name.endswith(".json"):
        return None  # half a YAML file is a YAML file
    text = original.text.rstrip()
    at = rng.randrange(1, len(text))
    return Case(text[:at], 1, text[:at].count("\n") + 1, key="truncated")


#: Mistake -> number of cases.
MISTAKES: dict[Mutation, int] = {
    misspelt_key: 260,
    another_type: 260,
    list_for_object: 60,
    null_value: 160,
    not_finite: 120,
    deep_nesting: 60,
    long_text: 60,
    long_key: 60,
    duplicate_key: 140,
    unknown_word: 140,
    out_of_range: 120,
    dropped_comma: 120,
    dropped_opening: 80,
    dropped_closing: 80,
    dropped_colon: 100,
    tab_indentation: 40,
    strange_bytes: 160,
    truncated: 60,
}
