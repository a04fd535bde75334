"""Reads the files of one metadata folder (`acme-1.0.dist-info`): what its entry_points.txt declares, and the
fields of METADATA that we need.

Well-formed files mean here what they mean to `importlib_metadata`. Headers that are written plainly, as every
build tool writes them, are read without importing it and `email`, which would cost more than all the rest;
anything else is handed to it.
"""

from __future__ import annotations

import os

ENTRY_POINTS = "entry_points.txt"
LIMIT = 1 << 20  # bytes that are read of one file; an entry_points.txt or a header of that size is a mistake

# A named pipe must not block us, whoever put it there.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_CHUNK = 1 << 14
_WANTED = ("name", "version", "requires-dist")
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")
_NO_CONTROLS = dict.fromkeys((*range(32), 127), "?")


class MetadataError(ValueError):
    """A file of a metadata folder that cannot be used; the message names the file and says why."""


class Fields:
    """The fields of METADATA: `name` and `version` are empty if it does not state them."""

    __slots__ = ("name", "requires", "version")

    def __init__(self, name: str, version: str, requires: tuple[str, ...]) -> None:
        self.name = name
        self.version = version
        self.requires = requires


class MetadataFolder:
    """A metadata folder on disk (or the single file that distutils wrote as `acme-1.0.egg-info`).

    Attributes:
        info: its path.
        location: the folder that holds the code.
    """

    __slots__ = ("info", "location")

    def __init__(self, info: str, location: str) -> None:
        self.info = info
        self.location = location

    def read(self, name: str) -> bytes | None:
        """Return the start of a file, at most `LIMIT` + 1 bytes; None if there is no such file.

        Raises:
            OSError: it is there and cannot be read.
        """
        try:
            return read_start(f"{self.info}/{name}" if name else self.info)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def fields(self) -> Fields:
        """Return name, version and requirements.

        Raises:
            MetadataError, OSError: there is no metadata, or it cannot be read.
        """
        name = ""
        for name in ("METADATA", "PKG-INFO", ""):
            try:
                data = self.read(name)
            except IsADirectoryError:
                continue
            if data:
                break
        else:
            raise MetadataError("it has no METADATA file")
        head = _head(name or os.path.basename(self.info), data)
        fields = _plain_fields(head)
        if fields is None or not fields.requires:
            requires = self.read("requires.txt")  # where setuptools wrote requirements before Requires-Dist
            if fields is None or requires:
                text = "" if requires is None else decode("requires.txt", requires)
                return _reference_fields({"METADATA": f"{head}\n\n", "requires.txt": text})
        return fields


def read_start(path: str) -> bytes:
    """Return the first `LIMIT` + 1 bytes of a file at most.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        data = os.read(descriptor, _CHUNK)  # nearly always all of it
        while data and len(data) <= LIMIT and (more := os.read(descriptor, LIMIT + 1 - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def decode(name: str, data: bytes) -> str:
    """Return the text of a whole file, lines ended by a line feed.

    Raises:
        MetadataError: it is too large, or not UTF-8.
    """
    if len(data) > LIMIT:
        raise MetadataError(f"{name} is larger than {LIMIT >> 20} MiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MetadataError(f"{name}:{line} is not UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def parse_entry_points(text: str) -> list[tuple[str, str, str]]:
    """Return (group, name, value) of each entry, as written.

    Raises:
        MetadataError: a line is neither a section, an entry nor a comment.
    """
    entries = []
    group = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            group = line.strip("[]")
        elif group is not None:  # what stands above the first section belongs to no group
            name, equals, value = line.partition("=")
            if not equals:
                said = f"{ENTRY_POINTS}:{number} ({line[:60].translate(_NO_CONTROLS)!r})"
                raise MetadataError(f"{said} is not of the form name = package.module:object")
            entries.append((group, name.strip(), value.strip()))
    return entries


def _head(name: str, data: bytes) -> str:
    """The header of METADATA: what stands above the first empty line. The description below it may be of any
    size and encoding.
    """
    text = data.decode("utf-8", "surrogateescape")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    head, end, _ = text.removesuffix("\n").partition("\n\n")
    if not end and len(data) > LIMIT:
        raise MetadataError(f"the header of {name} is larger than {LIMIT >> 20} MiB")
    try:
        head.encode("utf-8")
    except UnicodeEncodeError as error:
        line = head.count("\n", 0, error.start) + 1
        raise MetadataError(f"{name}:{line} is not UTF-8") from None
    return head


def _plain_fields(head: str) -> Fields | None:
    """The fields, if each line is `Field: value` or continues a field that we do not need."""
    found: dict[str, list[str]] = {field: [] for field in _WANTED}
    last = "name"
    for line in head.split("\n"):
        if line[:1] in (" ", "\t"):
            if last in found:
                return None
            continue
        field, colon, value = line.partition(":")
        last = field.lower()
        if not colon or not last or not _PLAIN.issuperset(last):
            return None
        if last in found:
            found[last].append(value.lstrip(" \t"))
    name, version, requires = found.values()
    return Fields(name[0] if name else "", version[0] if version else "", tuple(requires))


def _reference_fields(texts: dict[str, str]) -> Fields:
    """The fields as `importlib_metadata` reads them."""
    import importlib_metadata

    class Texts(importlib_metadata.Distribution):
        def read_text(self, filename: str) -> str | None:
            return texts.get(filename)

        def locate_file(self, path: object) -> importlib_metadata.SimplePath:
            raise NotImplementedError

    distribution = Texts()
    metadata = distribution.metadata
    return Fields(
        metadata.get("Name") or "", metadata.get("Version") or "", tuple(distribution.requires or ())
    )
