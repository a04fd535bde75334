"""Looks for metadata folders on the path: one listing per folder, one small read per distribution."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from mm_registry.groups import PREFIX
from mm_registry.metadata_files import ENTRY_POINTS, LIMIT, Fields, MetadataError, MetadataFolder
from mm_registry.spec import Diagnostic, canonical_name
from mm_registry.words import described, shown

_MENTION = PREFIX.encode()
_MENTION_IN_UTF16 = b"\0".join(b"%c" % byte for byte in _MENTION)  # but for the first or last zero
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{,198}[A-Za-z0-9])?")
_LONGEST_VERSION = 200
_VERSION_IN_STEM = re.compile(r"-v?\d")


class Copy:
    """A metadata folder of a distribution; there may be several of one distribution.

    Attributes:
        folder: its files.
        base: its name, `acme-1.0.dist-info`.
        name: canonical name of the distribution.
        place: the number of the folder on the path that holds it.
        entry_points: the bytes of entry_points.txt if they mention us, else empty.
        failed: whether it could not be read; there is a diagnostic then.
    """

    __slots__ = ("_fields", "base", "entry_points", "failed", "folder", "name", "place")

    def __init__(self, folder: MetadataFolder, base: str, place: int) -> None:
        self.folder = folder
        self.base = base
        self.name = canonical_name(_stem(base, folder.location))
        self.place = place
        self.entry_points = b""
        self.failed = False
        self._fields: Fields | None = None

    @property
    def is_egg(self) -> bool:
        return self.base.lower().endswith("egg-info")

    def fields(self) -> Fields:
        """Name, version and requirements; raises as `MetadataFolder.fields`, and for a name or a version that none
        can have.
        """
        if self._fields is None:
            fields = self.folder.fields()
            if fields.name and not _NAME.fullmatch(fields.name):
                raise MetadataError(f"its Name {shown(fields.name)} is not one that a distribution can have")
            if len(fields.version) > _LONGEST_VERSION or not fields.version.isprintable():
                raise MetadataError(
                    f"its Version {shown(fields.version)} is not one that a distribution can have"
                )
            self._fields = fields
        return self._fields


class Search:
    """Goes through a path once.

    Attributes:
        copies: every distribution by canonical name.
        mentioned: the names of those that mention us.
        egg_links: by canonical name, what `setup.py develop` leaves in place of a metadata folder.
        diagnostics: what could not be read.
    """

    def __init__(self) -> None:
        self.copies: dict[str, list[Copy]] = {}
        self.mentioned: set[str] = set()
        self.egg_links: dict[str, str] = {}
        self.diagnostics: list[Diagnostic] = []
        self._seen: set[tuple[int, int]] = set()
        self._place = 0

    def run(self, path: Sequence[str]) -> None:
        """Look at each entry of the path, and ask the finders of `sys.meta_path` as Python does: before or
        after it.
        """
        before, after = _foreign_finders()
        for finder in before:
            self._ask(finder, path)
        for entry in path:
            if isinstance(entry, str):  # Python ignores anything else
                self._place += 1
                self._list(entry)
        for finder in after:
            self._ask(finder, path)

    def failed(self, copy: Copy, error: Exception) -> None:
        """Note that the files of a copy cannot be read."""
        copy.failed = True
        mend = "make it readable, or reinstall" if isinstance(error, PermissionError) else "reinstall"
        where = f" ({copy.folder.info})" if copy.folder.info else ""
        message = f"the metadata of {copy.name}{where} cannot be read: {say(error)}; {mend} or remove it"
        self.diagnostics.append(
            Diagnostic("error", "unreadable-metadata", message, copy.name, copy.folder.info)
        )

    def _list(self, entry: str) -> None:
        try:
            folder = os.path.abspath(entry)  # fails if the working directory was deleted
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
            children = os.listdir(folder)
        except FileNotFoundError:
            return  # common: a path names folders that are made only when something is installed there
        except NotADirectoryError:
            self._open_archive(entry)
            return
        except (OSError, ValueError) as error:
            message = (
                f"{entry!r} on the path cannot be searched for distributions: {say(error)}; make it readable, "
                "or remove it from the path"
            )
            self._odd("error", "unreadable-path", message, entry)
            return
        in_egg = folder.lower().endswith(".egg")
        for child in children:
            lower = child.lower()
            if lower.endswith((".dist-info", ".egg-info")) or (in_egg and lower == "egg-info"):
                self._add(Copy(MetadataFolder(f"{folder}/{child}", folder), child, self._place))
            elif lower.endswith(".egg-link"):
                self.egg_links.setdefault(canonical_name(child[: -len(".egg-link")]), f"{folder}/{child}")

    def _open_archive(self, entry: str) -> None:
        from mm_registry.unusual_places import folders_in_archive

        try:
            found = folders_in_archive(os.path.abspath(entry))
        except Exception as error:  # noqa: BLE001 - a damaged archive fails in many ways, and must not hide the rest
            message = (
                f"{entry} on the path is neither a folder nor a zip archive that can be read: {say(error)}; "
                "replace it, or remove it from the path"
            )
            self._odd("warning", "unreadable-path", message, entry)
            return
        for base, folder in found:
            self._add(Copy(folder, base, self._place))

    def _ask(self, finder: Any, path: Sequence[str]) -> None:
        from mm_registry.unusual_places import distributions_of

        self._place += 1
        try:
            for folder in distributions_of(finder, path):
                base = os.path.basename(folder.info) or f"{folder.fields().name}.dist-info"
                self._add(Copy(folder, base, self._place))
        except Exception as error:  # noqa: BLE001 - a stranger's finder
            message = (
                f"the finder {_name(finder)} on sys.meta_path cannot tell its distributions: {say(error)}; "
                f"report it to the authors of {_module(finder)}"
            )
            self._odd("error", "broken-finder", message)

    def _add(self, copy: Copy) -> None:
        """Read entry_points.txt of a copy; one that does not mention us is only remembered."""
        leftover = copy.base.startswith("~")  # pip does not count it as installed either
        try:
            data = copy.folder.read(ENTRY_POINTS)
            if data:
                copy.entry_points = _mention(data)
        except Exception as error:  # noqa: BLE001 - one guarded call per distribution
            if not leftover:
                self.failed(copy, error)
        if leftover:
            if copy.entry_points:
                message = (
                    f"{copy.folder.info} is what an interrupted pip left of a plugin, and does not count; "
                    "remove it and, if ids are missing, install the plugin again"
                )
                self._odd("warning", "pip-leftover", message, copy.folder.info)
            return
        if copy.entry_points:
            copy.name = _declared_name(copy) or copy.name
            self.mentioned.add(copy.name)
        self.copies.setdefault(copy.name, []).append(copy)

    def _odd(self, level: str, code: str, message: str, path: str = "") -> None:
        self.diagnostics.append(Diagnostic(level, code, message, "", path))


def say(error: Exception) -> str:
    """An exception in one line."""
    return str(error) if isinstance(error, MetadataError) else described(error, 200)


def _declared_name(copy: Copy) -> str:
    """The canonical name in the metadata, which the name of the folder may only resemble; empty if it cannot
    be read (that is told when its record is read).
    """
    try:
        return canonical_name(copy.fields().name)
    except Exception:  # noqa: BLE001 - one guarded call per distribution
        return ""


def _mention(data: bytes) -> bytes:
    """Return `data` if it mentions us, else nothing."""
    if _MENTION in data:
        return data
    if data.startswith(_UTF16_MARKS) and _MENTION_IN_UTF16 in data:
        raise MetadataError(f"{ENTRY_POINTS} is UTF-16, not UTF-8")
    if len(data) > LIMIT:
        raise MetadataError(f"{ENTRY_POINTS} is larger than {LIMIT >> 20} MiB")
    return b""


def _stem(base: str, location: str) -> str:
    """The distribution's name in the name of a metadata folder; `foo-1.0.egg/EGG-INFO` is named by its
    parent.
    """
    if base.lower() == "egg-info":
        base = os.path.basename(location)
    stem = base.rpartition(".")[0]
    version = _VERSION_IN_STEM.search(stem, 1)
    # Old tools left dashes in names: my-plugin-1.0.dist-info.
    return stem[: version.start()] if version else stem.partition("-")[0]


def _foreign_finders() -> tuple[list[Any], list[Any]]:
    """The finders that know distributions of their own, before and after Python's own finder for the path."""
    before: list[Any] = []
    after: list[Any] = []
    foreign = before
    for finder in sys.meta_path:
        name = _name(finder)
        if name == "PathFinder":
            foreign = after
        elif name != "MetadataPathFinder" and callable(getattr(finder, "find_distributions", None)):
            foreign.append(finder)  # (MetadataPathFinder is importlib_metadata's, for the same path)
    return before, after


def _name(finder: Any) -> str:
    return str(getattr(finder, "__name__", type(finder).__name__))


def _module(finder: Any) -> str:
    return str(getattr(finder, "__module__", "it")).partition(".")[0]
