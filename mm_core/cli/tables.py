"""What small commands print: aligned columns, and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

# C0 without tab and line feed, delete, C1, and what turns or breaks a line: what a terminal obeys rather than shows.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# Of these, what `json.dumps` leaves as it is; and bytes of a command line that are no text.
_JSON_CONTROLS = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, indent: str = "") -> str:
    """Return lines with aligned columns, the header in capitals; each ends with a line feed."""
    lines = [[name.upper() for name in header], *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        indent
        + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def named_values(pairs: Iterable[tuple[str, str]], *, indent: str = "  ") -> str:
    """Return a line for each (name, value), the values aligned; a name that is empty continues the line
    above it.
    """
    rows = list(pairs)
    width = max((len(name) for name, _ in rows), default=0)
    return "".join(f"{indent}{name:<{width}}  {value}".rstrip() + "\n" for name, value in rows)


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: metadata and messages are written by strangers."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_text(value: Any) -> str:
    """Return `value` as indented JSON with a line feed at its end."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return _JSON_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
