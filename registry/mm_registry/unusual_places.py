"""Metadata that is not in folders on disk: in zip archives on the path, and with the finders of frozen
applications and the like on `sys.meta_path`. Imported only where there is any.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import importlib_metadata

from mm_registry.groups import PREFIX
from mm_registry.metadata_files import ENTRY_POINTS, LIMIT, Fields, MetadataError, MetadataFolder

_READ_AT_ONCE = ("METADATA", "PKG-INFO", "requires.txt", "direct_url.json")


class ArchivedFolder(MetadataFolder):
    """A metadata folder in a zip archive; what we need of a plugin's is read while the archive is open."""

    __slots__ = ("_archive", "_inner", "_kept")

    def __init__(self, archive: zipfile.ZipFile, path: str, inner: str, location: str) -> None:
        super().__init__(f"{path}/{inner}", location)
        self._archive = path
        self._inner = inner
        self._kept: dict[str, bytes | None] = {}
        self._kept[ENTRY_POINTS] = self._read(archive, ENTRY_POINTS)
        if PREFIX.encode() in (self._kept[ENTRY_POINTS] or b""):
            for name in _READ_AT_ONCE:
                self._kept[name] = self._read(archive, name)

    def read(self, name: str) -> bytes | None:
        if name not in self._kept:
            with zipfile.ZipFile(self._archive) as archive:
                self._kept[name] = self._read(archive, name)
        return self._kept[name]

    def _read(self, archive: zipfile.ZipFile, name: str) -> bytes | None:
        try:
            with archive.open(f"{self._inner}/{name}") as file:
                return file.read(LIMIT + 1)
        except KeyError:
            return None


class FoundFolder(MetadataFolder):
    """A distribution that a finder on `sys.meta_path` gave; only its documented interface is used."""

    __slots__ = ("_distribution",)

    def __init__(self, distribution: Any) -> None:
        info = getattr(distribution, "_path", None)
        try:
            location = os.path.abspath(str(distribution.locate_file("")))
        except Exception:  # noqa: BLE001 - a finder need not tell where files are
            location = ""
        super().__init__("" if info is None else str(info), location)
        self._distribution = distribution

    def read(self, name: str) -> bytes | None:
        if name != ENTRY_POINTS:
            text = self._distribution.read_text(name)
            return None if text is None else str(text).encode("utf-8", "surrogateescape")
        # A finder may build its entry points from anything.
        entries = [entry for entry in self._distribution.entry_points if entry.group.startswith(PREFIX)]
        return "".join(f"[{e.group}]\n{e.name} = {e.value}\n" for e in entries).encode()

    def fields(self) -> Fields:
        metadata = self._distribution.metadata
        if metadata is None:
            raise MetadataError("it has no metadata")
        requires = tuple(self._distribution.requires or ())
        return Fields(metadata.get("Name") or "", metadata.get("Version") or "", requires)


def folders_in_archive(entry: str) -> list[tuple[str, ArchivedFolder]]:
    """Return (name, folder) of the metadata folders at an entry of the path that is a zip archive, or a
    folder in one (`app.zip/lib`).

    Raises:
        OSError, zipfile.BadZipFile and what else zipfile raises: it is none, or a damaged one.
    """
    path = entry
    while not os.path.isfile(path):
        above = os.path.dirname(path)
        if above == path:
            raise FileNotFoundError(entry)
        path = above
    inside = entry[len(path) :].replace(os.sep, "/").strip("/")
    prefix = f"{inside}/" if inside else ""
    with zipfile.ZipFile(path) as archive:
        children = sorted({
            name[len(prefix) :].partition("/")[0] for name in archive.namelist() if name.startswith(prefix)
        })  # fmt: skip
        return [
            (child, ArchivedFolder(archive, path, f"{prefix}{child}", entry))
            for child in children
            if is_metadata_folder(child, entry)
        ]


def is_metadata_folder(child: str, parent: str) -> bool:
    """Whether a child of an entry of the path is named as a metadata folder is."""
    lower = child.lower()
    return lower.endswith((".dist-info", ".egg-info")) or (
        lower == "egg-info" and parent.lower().endswith(".egg")
    )


def distributions_of(finder: Any, path: Sequence[str]) -> Iterator[FoundFolder]:
    """Yield what a finder of `sys.meta_path` has on `path`. Raises whatever the finder raises."""
    context = importlib_metadata.DistributionFinder.Context(path=list(path))
    for distribution in finder.find_distributions(context):
        yield FoundFolder(distribution)
