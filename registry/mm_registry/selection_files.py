"""Reads the selection files of an environment and of a project."""

from __future__ import annotations

import os
import re
import stat
import tomllib  # this module is imported only when there is such a file

from mm_registry.errors import SelectionError
from mm_registry.selection import SelectionLayer
from mm_registry.spec import canonical_name
from mm_registry.suggestions import closest
from mm_registry.words import clip, described

_TABLE = "plugins"
_LIMIT = 1 << 20  # bytes
_UTF8_MARK = b"\xef\xbb\xbf"
_NAME = r"""(?:"[^"\\]*"|'[^']*'|[A-Za-z0-9_-]+)"""
_HEADER = re.compile(rf"\s*\[\s*({_NAME}(?:\s*\.\s*{_NAME})*)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(rf"\s*({_NAME}(?:\s*\.\s*{_NAME})*)\s*=")
_PART = re.compile(_NAME)
_STRING = re.compile(r""""([^"\\]*)"|'([^']*)'""")


def read_layer(path: str | os.PathLike[str]) -> SelectionLayer:
    """Read a selection file: a table `[plugins]` with `allow`, `disable`, `enable` and `prefer`.

    Raises:
        SelectionError: it cannot be read, is no TOML, or says something that it may not; the message begins
            with file and line.
    """
    origin = shown_path(path)
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading it could wait for ever
            raise SelectionError("the file cannot be read: it is a pipe, a socket or a device", origin)
        with open(path, "rb") as file:
            raw = file.read(_LIMIT + 1)
    except OSError as error:
        why = error.strerror or str(error)
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            why = f"it is a link to {os.readlink(path)}, which does not exist; mend or remove the link"
        raise SelectionError(f"the file cannot be read: {why}", origin) from error
    if len(raw) > _LIMIT:
        raise SelectionError(
            f"the file is larger than {_LIMIT >> 20} MiB, so it cannot be what is meant", origin
        )
    if raw.startswith(_UTF8_MARK):
        raise SelectionError(
            "the file starts with a byte order mark; save it as UTF-8 without one", origin, 1
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SelectionError("the file is not UTF-8 text; save it as UTF-8", origin, line) from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = re.search(r"\(at line (\d+)", str(error))
        line = int(said[1]) if said else text.count("\n") + 1
        problem = re.sub(r" \(at .*\)$", "", str(error))
        raise SelectionError(f"this is no TOML: {problem}", origin, line) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets
        raise SelectionError(f"this cannot be read as TOML: {described(error)}", origin) from error
    lines = _lines(text)
    for key in data:
        if key != _TABLE:
            mend = 'did you mean "plugins"?' if closest(key, [_TABLE], 1) else "the only table is [plugins]"
            problem = f'"{clip(key)}" is unknown in a selection file; {mend}'
            raise SelectionError(problem, origin, lines.get((key,)), (key,))
    table = data.get(_TABLE, {})
    if not isinstance(table, dict):
        raise SelectionError('"plugins" is no table; write [plugins]', origin, lines.get((_TABLE,)))
    inside = {key[1:]: line for key, line in lines.items() if key[0] == _TABLE}
    return SelectionLayer.from_table(origin, table, inside)


def shown_path(path: str | os.PathLike[str]) -> str:
    """Return a path as short as it can be said: relative when it lies below the working directory."""
    path = os.path.abspath(path)
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):  # a deleted working directory, or another drive
        return path
    return path if relative.startswith(os.pardir) else relative


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Return where each key stands, and each name in the lists of [plugins], as (table, key, name) -> line.
    tomllib has read the text; it does not say where things stand.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    current: tuple[str, ...] = ()
    for number, line in enumerate(text.split("\n"), 1):
        header = _HEADER.match(line)
        key = _KEY.match(line)
        rest = line
        if header:
            table = current = _parts(header[1])
            rest = ""
        elif key:
            current = (*table, *_parts(key[1]))
            rest = line[key.end() :]
        for length in range(1, len(current) + 1):
            lines.setdefault(current[:length], number)
        if current[:1] == (_TABLE,) and len(current) == 2:
            for found in _STRING.finditer(rest):
                name = found[1] or found[2] or ""
                item = name if current[1] == "prefer" else canonical_name(name)
                lines.setdefault((*current, item), number)
    return lines


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))
