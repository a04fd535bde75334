"""Annotations in tables can be read: their columns, and the first rows of CSV."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from itertools import islice
from typing import Any

from mm_core.config.document import expanded
from mm_core.config.findings import Finding, Level, show

#: Endings of tables; `mm_core.data.tables` reads them.
TABLES = (".csv", ".parquet")
_ROWS = 100
_SHOWN = 200  # characters: a file of another kind may have a long first line


def check_table(file: str, named_at: str, level: Level) -> Iterator[Finding]:
    """What training will find in the beginning of a table of annotations.

    Args:
        file: .csv or .parquet.
        named_at: where the file is named, for a file that cannot be opened.
        level: of the findings.
    """
    if file.lower().endswith(".parquet"):
        if importlib.util.find_spec("pyarrow") is None:
            text, mend = "reading Parquet needs the package pyarrow", "Run `pip install pyarrow`"
            yield Finding(level, "missing-package", text, file, suggestion=mend)
        return
    try:
        with expanded(file).open(encoding="utf-8-sig", newline="") as stream:
            yield from _csv(csv.reader(stream, strict=True), file, level)
    except UnicodeDecodeError as error:
        text = f"it is not UTF-8 text (byte {error.start})"
        yield Finding(level, "bad-data", text, file, suggestion="Save it as UTF-8")
    except csv.Error as error:
        yield Finding(level, "bad-data", f"it is no CSV: {error}", file)
    except OSError as error:
        text = f"{show(file)} cannot be read: {(error.strerror or str(error)).lower()}"
        yield Finding(level, "bad-data", text, named_at)


def _csv(reader: Any, file: str, level: Level) -> Iterator[Finding]:
    header = [name.strip() for name in next(reader, [])]
    for name in ("path", "cap"):
        if name not in header:
            text = f'the table has no column "{name}"; its columns are {", ".join(header)[:_SHOWN] or "none"}'
            mend = "The first line must name the columns, path and cap among them"
            yield Finding(level, "bad-data", text, file, 1, suggestion=mend)
            return
    found = 0
    for cells in islice(reader, _ROWS):
        if not any(cells):
            continue
        found += 1
        line = reader.line_num
        if len(cells) != len(header):
            text = f"the row has {len(cells)} cells, but the header {len(header)}"
            mend = 'Put texts that hold a comma into "double quotes"'
            yield Finding(level, "bad-data", text, file, line, suggestion=mend)
        elif not cells[header.index("path")]:
            yield Finding(level, "bad-data", "the row has no path", file, line)
    if not found:
        yield Finding(level, "bad-data", "it names no sample: there is no row", file)
