"""What small commands print: aligned columns, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any


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


def json_text(value: Any) -> str:
    """Return `value` as indented JSON with a line feed at its end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
