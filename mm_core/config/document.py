"""A configuration file as data plus the place of every key and value."""

from __future__ import annotations

import copy
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_core.config.findings import ConfigError, Finding, clip, closest, show
from mm_core.config.origin import DEFAULT, KeyPath, Origin, dotted

#: Larger files are no configuration; reading them would only hide the mistake of naming, say, a weights file.
MAX_BYTES = 8 * 1024 * 1024
#: Nesting beyond this is an attack or a generator gone wrong, and would overflow the parsers' stacks.
MAX_DEPTH = 64
#: The largest job that we know has some 300 values; a list of files or samples belongs into a data file.
MAX_VALUES = 100_000
EXTENSIONS = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Document:
    """The content of one file.

    Attributes:
        path: the file as the user named it.
        data: plain Python data: dict, list, str, int, float, bool, None.
        origins: place of each value, by its path; `()` is the top level.
        keys: place of each object member's name, by the member's path.
    """

    path: str
    data: dict[str, Any]
    origins: Mapping[KeyPath, Origin] = field(default_factory=dict)
    keys: Mapping[KeyPath, Origin] = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: Mapping[str, Any], origin: Origin = DEFAULT) -> Document:
        """Wrap data that was not read from a file."""
        return cls(origin.file or "", copy.deepcopy(dict(data)), {(): origin}, {})

    def origin(self, path: KeyPath) -> Origin:
        """Return where the value at `path` was written, or the nearest object around it."""
        return _nearest(self.origins, path)

    def key_origin(self, path: KeyPath) -> Origin:
        """Return where the name of the member at `path` was written; for what has no name, where its value
        was.
        """
        return self.keys.get(path) or self.origin(path)

    def value(self, path: KeyPath) -> Any:
        """Return the value at `path`. Raises KeyError when there is none."""
        node: Any = self.data
        for part in path:
            member = isinstance(node, Mapping) and isinstance(part, str) and part in node
            item = isinstance(node, list) and isinstance(part, int) and 0 <= part < len(node)
            if not member and not item:
                raise KeyError(path)
            node = node[part]
        return node

    def has(self, path: KeyPath) -> bool:
        try:
            self.value(path)
        except KeyError:
            return False
        return True

    def section(self, path: KeyPath) -> Document:
        """Return the object at `path` as a document of its own: the same file and places, paths from there.

        Raises:
            KeyError: there is no object at `path`.
        """
        data = self.value(path)
        if not isinstance(data, dict):
            raise KeyError(path)
        size = len(path)
        inside = (
            {key[size:]: place for key, place in places.items() if key[:size] == path}
            for places in (self.origins, self.keys)
        )
        return Document(self.path, copy.deepcopy(data), *inside)

    def grafted(self, path: KeyPath, source: Document, at: KeyPath) -> Document:
        """Return a copy in which `path` has what `source` has at `at`, places included."""
        result = self.replaced(path, source.value(at), source.origin(at))
        origins, keys = dict(result.origins), dict(result.keys)
        size = len(at)
        for places, target in ((source.origins, origins), (source.keys, keys)):
            target.update({(*path, *key[size:]): place for key, place in places.items() if key[:size] == at})
        return Document(result.path, result.data, origins, keys)

    def replaced(self, path: KeyPath, value: Any, origin: Origin) -> Document:
        """Return a copy in which `path` has `value`, written by `origin`. Missing objects on the way are
        made, by `origin` too.
        """
        data = copy.deepcopy(self.data)
        node: Any = data
        made: list[KeyPath] = []
        for length, part in enumerate(path[:-1], 1):
            if isinstance(node, dict):
                if part not in node:
                    made.append(path[:length])
                node = node.setdefault(str(part), {})
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                raise KeyError(path)
        node[path[-1]] = copy.deepcopy(value)
        below = len(path)
        origins = {key: place for key, place in self.origins.items() if key[:below] != path}
        keys = {key: place for key, place in self.keys.items() if key[:below] != path}
        for place in (*made, path):
            origins[place] = keys[place] = origin
        return Document(self.path, data, origins, keys)


def _nearest(origins: Mapping[KeyPath, Origin], path: KeyPath) -> Origin:
    for length in range(len(path), -1, -1):
        origin = origins.get(path[:length])
        if origin is not None:
            return origin
    return DEFAULT


def syntax_error(
    path: str, message: str, line: int | None = None, column: int | None = None, suggestion: str = ""
) -> ConfigError:
    """Return the error of a file that cannot be read at all."""
    return ConfigError([Finding("error", "syntax", message, path, line, column, "", suggestion)])


def too_many_values(path: str, line: int | None, column: int | None) -> ConfigError:
    """Return the error of a file with more than MAX_VALUES values; the place is that of the first too many."""
    text = f"the file holds more than {MAX_VALUES} values"
    return syntax_error(path, text, line, column, "Name a file that holds them instead")


def read_document(path: str | Path) -> Document:
    """Read a `.json` (comments and trailing commas allowed), `.yaml` or `.yml` file.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, empty, of an unknown kind, malformed, or
            holds no object at its top level. The finding names the place and how to mend it.
    """
    name = str(path)
    file = expanded(name)
    text = _read_text(name, file)
    # Imported here because a job of JSON files needs no YAML parser, which is slow to import.
    if file.suffix.lower() == ".json":
        from mm_core.config.json_reader import parse_json as parse
    else:
        from mm_core.config.yaml_reader import parse_yaml as parse
    document = parse(text, name)
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, list) else "a single value"
        line, column = document.origin(()).line, document.origin(()).column
        what = f"the top level is {kind}, expected an object of keys and values"
        mend = (
            "Write key: value, with a space after the colon"
            if kind == "a single value" and ":" in text
            else ""
        )
        raise syntax_error(name, what, line, column, mend)
    return document


def _read_text(name: str, file: Path) -> str:
    if not name:
        raise ConfigError([Finding("error", "missing-file", "no file is named (the path is empty)")])
    try:
        if file.is_dir():
            raise syntax_error(name, "this is a folder, expected a file", suggestion=_files_inside(file))
        if not file.exists():
            if file.is_symlink():
                raise syntax_error(name, f"this is a symbolic link that leads nowhere, to {file.readlink()}")
            raise missing_file(name)
        if file.suffix.lower() not in EXTENSIONS:
            raise syntax_error(
                name,
                f"unknown kind of file {show(file.suffix)}",
                suggestion=f"Name a file that ends in {', '.join(EXTENSIONS)}",
            )
        if not file.is_file():
            # Opening a pipe would wait for a writer that may never come.
            raise syntax_error(name, "this is no regular file (a pipe, socket or device), expected one")
        if file.stat().st_size > MAX_BYTES:
            raise syntax_error(
                name, f"the file has {file.stat().st_size} bytes; a configuration has at most {MAX_BYTES}"
            )
        raw = _read_bytes(file)
    except OSError as error:
        raise syntax_error(name, f"the file cannot be read: {error.strerror or error}") from error
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise syntax_error(name, "the file is UTF-16 text, expected UTF-8", 1, 1, "Save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise syntax_error(
            name,
            f"the file is not UTF-8 text (byte 0x{raw[error.start]:02x})",
            line,
            column,
            "Save it as UTF-8",
        ) from error
    if "\0" in text:
        before = text[: text.index("\0")]
        line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
        what = "a NUL character: this is UTF-16 text, or no text at all"
        raise syntax_error(name, what, line, column, "Save it as UTF-8")
    if not text.strip():
        raise syntax_error(name, "the file is empty", 1, 1, "Write at least {}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(file: Path) -> bytes:
    """Read a file that is regular still when it is open; one that would make us wait is an error."""
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError("it is no regular file")
        return stream.read(MAX_BYTES + 1)


def link_note(name: str, origin: Origin | None = None, path: KeyPath = ()) -> Finding | None:
    """Return a note if a file or folder that the user names is a symbolic link, telling where it leads; else None.

    Links are followed, but what is read then is not what was named: somebody else may have put it there.

    Args:
        origin, path: where the name is written, if that is in a file.
    """
    place = expanded(name)
    try:
        if not place.is_symlink():
            return None
        target = os.path.realpath(place)
    except (OSError, ValueError):
        return None  # whoever opens it says what is wrong
    if origin is None:
        return Finding("note", "symlink", f"this is a symbolic link; what is read is {clip(target)}", name)
    text = f'{dotted(path)} is "{clip(name)}": a symbolic link; what is read is {clip(target)}'
    return Finding.at(origin, "note", "symlink", text, path=path)


def link_notes(*names: str | None) -> tuple[Finding, ...]:
    """Return the notes of those of the files that are symbolic links; None is no file."""
    notes = (link_note(name) for name in dict.fromkeys(names) if name)
    return tuple(note for note in notes if note is not None)


def _files_inside(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in EXTENSIONS)
    return f"Files in it: {', '.join(names[:8])}" if names else ""


def missing_file(name: str) -> ConfigError:
    """Return the error for a file that does not exist, with the closest existing one."""
    return ConfigError(
        [Finding("error", "missing-file", "no such file", name, suggestion=closest_path(name))]
    )


def expanded(path: str) -> Path:
    """Return a path with `~` filled in, or as it is if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def closest_path(name: str) -> str:
    """Return a sentence that helps with a path that does not exist: where it stops existing, and the closest
    name there.
    """
    path = expanded(name)
    wanted, folder = path.name, path.parent
    while (
        not os.path.exists(folder) and folder != folder.parent
    ):  # which a name that is too long cannot upset
        wanted, folder = folder.name, folder.parent
    if not folder.is_dir():
        return f"{folder} is a file, not a folder" if folder.is_file() else ""
    try:
        # A symbolic link that leads nowhere is listed under the very name that does not exist.
        near = closest(wanted, [entry.name for entry in folder.iterdir() if entry.name != wanted])
    except OSError:
        return ""
    if near is not None:
        return f"Did you mean {folder / near}?"
    if folder == path.parent:
        # The folder is right and nothing in it looks alike: the working directory is often the surprise.
        shown = Path.cwd() if str(folder) == "." else folder
        return f"Nothing in {shown} has a similar name"
    return f"The folder {clip(str(folder / wanted))} does not exist"
