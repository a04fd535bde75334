"""Annotations in tables: CSV, and Parquet where pyarrow is installed.

A row is one video. Columns have the names of an annotation's keys; `height` and `width` may stand for `resolution`. In
CSV an empty cell says nothing, and a cell may hold JSON: several captions, `cut`, `crop` and `resolution`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm_core.data.errors import DataError

TABLES = (".csv", ".parquet")
_NUMBERS = ("num_frames", "fps", "duration", "height", "width", "aesthetic", "aes")
_JSON = ("cut", "crop", "resolution")
_ROWS_AT_ONCE = 4096


def is_table(path: Path) -> bool:
    """Whether a file holds annotations as a table, by the ending of its name."""
    return path.suffix.lower() in TABLES


def table_items(path: Path, named_at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it stands, annotation as a mapping) of each row.

    Args:
        named_at: who names the file, for messages.

    Raises:
        DataError: the file is missing or malformed, or pyarrow is; with file and line or row.
    """
    try:
        yield from (_parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"{named_at}: {path} cannot be read: {reason}") from error


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, f"{path}:1")
            line = reader.line_num + 1
            for cells in reader:
                origin, line = f"{path}:{line}", reader.line_num + 1
                if not any(cells):
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{origin}: the row has {len(cells)} cells, but the header {len(header)}; put texts that hold a "
                        'comma into "double quotes"'
                    )
                row = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
                yield origin, _item({name: _value(name, cell, origin) for name, cell in row.items()}, origin)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: it is no CSV: {error}") from error


def _value(name: str, cell: str, origin: str) -> Any:
    """What a cell of CSV means."""
    if name in _NUMBERS:
        try:
            return _whole(float(cell))
        except ValueError:
            return cell  # which is told as no number
    if name in _JSON or (name == "cap" and cell.lstrip().startswith("[")):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError) as error:
            if name == "cap":
                return cell  # a caption may begin with a bracket
            raise DataError(f"{origin}: {name} is {cell[:60]!r}, but must be JSON ({error})") from error
    return cell


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs the package pyarrow; run `pip install pyarrow`, or save the table as CSV or "
            "JSON Lines"
        ) from error
    number = 0
    try:
        # Memory mapped, and in pieces: a table may have millions of rows.
        with parquet.ParquetFile(path, memory_map=True) as file:
            _check_header(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                # No key of an annotation is a time, and not every time is one of Python's.
                told = [
                    n for n, field in enumerate(batch.schema) if not pyarrow.types.is_temporal(field.type)
                ]
                for row in batch.select(told).to_pylist():
                    number += 1
                    origin = f"{path}: row {number}"
                    # Where a number is missing, pandas writes NaN.
                    said = {k: _whole(v) for k, v in row.items() if v is not None and v == v}
                    yield origin, _item(said, origin)
    except UnicodeDecodeError:
        raise
    # Beside pyarrow's own errors those of values that Python does not have.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: it is no Parquet file that pyarrow can read: {error}") from error


def _whole(value: Any) -> Any:
    """A whole number as an int: tables often keep them as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_header(names: list[str], origin: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f'{origin}: two columns are named "{twice}"')
    missing = [name for name in ("path", "cap") if name not in names]
    if missing:
        columns = ", ".join(names) or "none"
        raise DataError(
            f'{origin}: the table has no column "{missing[0]}"; its columns are {columns}, and path and cap must be among '
            "them (in CSV, in the first line)"
        )


def _item(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A row as an annotation: height and width become a resolution."""
    item = {"cap": "", **row}  # a caption that is left empty
    height, width = item.pop("height", None), item.pop("width", None)
    if "resolution" in item or (height is None and width is None):
        return item
    if height is None or width is None:
        raise DataError(f"{origin}: it has only one of height and width; give both, or none")
    return {**item, "resolution": {"height": height, "width": width}}
