"""The syntax of module patterns, in `fsdp2.yaml` and in sharding policies. A malformed one is found without a model.

`mm_core.sharding.patterns` resolves them and describes what they mean.
"""

from __future__ import annotations

import itertools
import math
import re

ANY = "\0"
"""Stands for `{*}` in a name that `names_of` returns: one character or more. No module's name holds it."""
STAR, ONE = "\1", "\2"
"""Stand for a `*` and a `?` outside braces there: any number of characters, and one."""

_PIECE = re.compile(r"\{([^{}]*)\}|([^{}]+)")
_RANGE = re.compile(r"([0-9]+)\s*-\s*([0-9]+)")
_FOREIGN_RANGE = re.compile(r"([0-9]+)\s*(?:[\u2010-\u2015\u2212:]|\.\.\.?)\s*([0-9]+)")
_HALF_RANGE = re.compile(r"[0-9]+\s*-")
_CLASS = re.compile(r"([^\W\d]\w*\.)*_*[A-Z]\w*")
_MOST_NAMES = 10_000


class PatternSyntaxError(ValueError):
    """A pattern is malformed; the text says how and how to mend it, a part of a sentence."""


def pattern_problem(pattern: str) -> str | None:
    """Return what is wrong with the syntax of a pattern of `fsdp2.yaml`, a part of a sentence; None if nothing is."""
    problem = syntax_problem(pattern)
    if problem is None and (first := pattern.strip()[0]) in "{*?":
        what = "braces" if first == "{" else first
        return f"it begins with {what}; begin with a part of the model, such as predictor.blocks.{{*}}"
    return problem


def syntax_problem(pattern: str) -> str | None:
    """The same for a pattern of a sharding policy, which begins inside the component."""
    try:
        split_names(pattern)
    except PatternSyntaxError as error:
        return str(error)
    return None


def split_names(pattern: str) -> list[str]:
    """Split a pattern at the dots outside braces, and check each part.

    Raises:
        PatternSyntaxError: unbalanced braces, an empty name, a wrong item in braces, `**`, brackets.
    """
    depth, parts, current = 0, [], ""
    for character in pattern.strip():
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth not in (0, 1):
            raise PatternSyntaxError("unbalanced braces; each { needs one } and they do not nest")
        if character == "." and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    if depth:
        raise PatternSyntaxError("unbalanced braces; a { is not closed")
    parts.append(current)
    for part in parts:
        _check_name(part)
    return parts


def names_of(part: str) -> list[str]:
    """The names that one part of a pattern stands for, with `ANY`, `STAR` and `ONE` in them, none twice.

    Raises:
        PatternSyntaxError: as `split_names`.
    """
    pieces = [
        [match.group(2).replace("*", STAR).replace("?", ONE)]
        if match.group(1) is None
        else _items(match.group(1))
        for match in _PIECE.finditer(part)
    ]
    if math.prod(len(piece) for piece in pieces) > _MOST_NAMES:
        raise PatternSyntaxError(f"{part} stands for absurdly many names")
    return list(dict.fromkeys("".join(choice) for choice in itertools.product(*pieces)))


def is_class_path(pattern: str) -> bool:
    """Whether a pattern could be `package.module.ClassName` or `ClassName`."""
    return _CLASS.fullmatch(pattern.strip()) is not None


def _check_name(part: str) -> None:
    if not part.strip():
        raise PatternSyntaxError("an empty name; write a path such as predictor.blocks.{*}")
    strange = next((character for character in part if not character.isprintable()), None)
    if strange is not None:
        raise PatternSyntaxError(
            f"an invisible character, U+{ord(strange):04X}; write the name anew, in plain letters"
        )
    outside = re.sub(r"\{[^}]*\}", "", part)
    if "**" in outside:
        raise PatternSyntaxError(
            "** is not understood; write {*} once for each name that it stands for: predictor.blocks.{*}.attn1"
        )
    if re.search(r"[\[\]]", outside):
        raise PatternSyntaxError(
            "brackets mean nothing here; numbers stand in braces: predictor.blocks.{0-3,7}"
        )
    names_of(part)


def _items(text: str) -> list[str]:
    numbers: set[int] = set()
    names: list[str] = []
    for item in (part.strip() for part in text.split(",")):
        if item == "*":
            names.append(ANY)
        elif match := _RANGE.fullmatch(item):
            first, last = int(match.group(1)), int(match.group(2))
            if first > last:
                raise PatternSyntaxError(f"the range {item} runs backwards; write {{{last}-{first}}}")
            if last - first > _MOST_NAMES:
                raise PatternSyntaxError(f"the range {item} is absurdly long")
            numbers.update(range(first, last + 1))
        elif item.isascii() and item.isdecimal():
            numbers.add(int(item))
        elif match := _FOREIGN_RANGE.fullmatch(item):
            raise PatternSyntaxError(f"{item} is no range; write {{{match.group(1)}-{match.group(2)}}}")
        elif item and _HALF_RANGE.fullmatch(item):
            raise PatternSyntaxError(f"the range {item} lacks an end, and numbers begin at 0; write {{0-20}}")
        elif item and not re.search(r"[*?.\s]", item) and not item.startswith("-"):
            names.append(item)
        else:
            what = f'"{item}"' if item else "an empty item"
            raise PatternSyntaxError(
                f"{what} in braces is neither *, a number, a range such as 0-20 nor a name"
            )
    return [str(number) for number in sorted(numbers)] + names
