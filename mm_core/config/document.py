"""A configuration file as data plus the place of every key and value."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_core.config.findings import ConfigError, Finding, closest, show
from mm_core.config.origin import DEFAULT, KeyPath, Origin

#: Larger files are no configuration; reading them would only hide the mistake of naming, say, a weights file.
MAX_BYTES = 8 * 1024 * 1024
#: Nesting beyond this is an attack or a generator gone wrong, and would overflow the parsers' stacks.
MAX_DEPTH = 64
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

    def replaced(self, path: KeyPath, value: Any, origin: Origin) -> Document:
        """Return a copy in which `path` has `value`, written by `origin`. Missing objects on the way are
        made.
        """
        data = copy.deepcopy(self.data)
        node: Any = data
        for part in path[:-1]:
            if isinstance(node, dict):
                node = node.setdefault(str(part), {})
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                raise KeyError(path)
        node[path[-1]] = copy.deepcopy(value)
        below = len(path)
        origins = {key: place for key, place in self.origins.items() if key[:below] != path}
        keys = {key: place for key, place in self.keys.items() if key[:below] != path}
        origins[path] = keys[path] = origin
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
        kind = "a list" if isinstance(document.data, list) else show(document.data)
        raise syntax_error(name, f"the top level is {kind}, expected an object of keys and values", 1, 1)
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
        raw = file.read_bytes()
    except OSError as error:
        raise syntax_error(name, f"the file cannot be read: {error.strerror or error}") from error
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
    if not text.strip():
        raise syntax_error(name, "the file is empty", 1, 1, "Write at least {}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


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
    while not folder.exists() and folder != folder.parent:
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
    return f"The folder {folder / wanted} does not exist"
