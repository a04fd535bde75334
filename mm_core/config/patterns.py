"""The syntax of module patterns in `fsdp2.yaml`, so that a malformed one is found without a model.

`mm_core.sharding.patterns` resolves them and describes what they mean.
"""

from __future__ import annotations

import re

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")
_LONGEST_RANGE = 100_000


def pattern_problem(pattern: str) -> str | None:
    """Return what is wrong with the syntax of a pattern and how to mend it, a part of a sentence; None if
    nothing is.
    """
    pattern = pattern.strip()
    depth = 0
    for character in pattern:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth not in (0, 1):
            return "unbalanced braces; each { needs one } and they do not nest"
    if depth:
        return "unbalanced braces; a { is not closed"
    if pattern.startswith("{"):
        return "it begins with braces; begin with a part of the model, such as predictor.blocks.{*}"
    # Dots in braces separate nothing; the braces' content is looked at below.
    outside = _BRACES.sub("{}", pattern)
    if any(not name.strip() for name in outside.split(".")):
        return "an empty name; write a path such as predictor.blocks.{*}"
    if re.search(r"[*?\[\]]", outside):
        return "* and ? stand in braces here; write predictor.blocks.{*}"
    items = (item.strip() for inside in _BRACES.findall(pattern) for item in inside.split(","))
    return next(filter(None, map(_item_problem, items)), None)


def _item_problem(item: str) -> str | None:
    numbers = _RANGE.fullmatch(item)
    if numbers:
        first, last = int(numbers.group(1)), int(numbers.group(2))
        if first > last:
            return f"the range {item} runs backwards; write {{{last}-{first}}}"
        return f"the range {item} is absurdly long" if last - first > _LONGEST_RANGE else None
    if item == "*" or (item and not re.search(r"[*?.\s]", item) and not item.startswith("-")):
        return None
    what = f'"{item}"' if item else "an empty item"
    return f"{what} in braces is neither *, a number, a range such as 0-20 nor a name"
