"""Finds the installed distributions that declare entries of ours. Imports none of them, and no stranger's
broken metadata stops it.

One listing per folder on the path, one small read per distribution: where entry_points.txt does not contain
`mm_core.`, nothing else is looked at. Every access to one distribution's files is guarded: what fails becomes
a `Diagnostic`, the others go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mm_registry.groups import PREFIX
from mm_registry.metadata_files import ENTRY_POINTS, MetadataError, decode, parse_entry_points
from mm_registry.origin import linked_source, origin_of
from mm_registry.search import Copy, Search, say
from mm_registry.spec import Diagnostic, canonical_name

_UTF8_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One distribution that declares entries of ours.

    Attributes:
        name, version: as its metadata states them.
        path, editable, origin: as in `EntrySpec`.
        requires: its `Requires-Dist` lines.
        entries: (group, name, value) of each entry of ours, as written.
        info: its metadata folder; empty if a custom finder tells none.
    """

    name: str
    version: str
    path: str
    editable: bool
    origin: str
    requires: tuple[str, ...]
    entries: tuple[tuple[str, str, str], ...]
    info: str = ""


class Installed:
    """Every distribution on the path.

    Attributes:
        records: those that declare entries of ours, by canonical name.
        diagnostics: what was odd, sorted by content.
    """

    def __init__(
        self, records: Iterable[Record], diagnostics: Iterable[Diagnostic], copies: Mapping[str, list[Copy]]
    ) -> None:
        self.records = tuple(records)
        self.diagnostics = tuple(
            sorted(diagnostics, key=lambda d: (d.level, d.code, d.distribution, d.path, d.message))
        )
        self._copies = copies
        self._versions: dict[str, str | None] = {}

    def version(self, distribution: str) -> str | None:
        """The installed version of a distribution; None if it is not installed or does not say."""
        name = canonical_name(distribution)
        if name not in self._versions:
            self._versions[name] = next(
                filter(None, map(_version, _by_preference(self._copies.get(name, [])))), None
            )
        return self._versions[name]

    def record(self, distribution: str) -> Record | None:
        """The record of a distribution; None if it is not installed or declares no entries of ours."""
        name = canonical_name(distribution)
        return next((record for record in self.records if canonical_name(record.name) == name), None)


def read_installed(path: Sequence[str]) -> Installed:
    """Read the distributions on `path` (entries as in `sys.path`)."""
    search = Search()
    search.run(path)
    records = [_record_of(search.copies[name], search) for name in sorted(search.mentioned)]
    ours = (record for record in records if record is not None and record.entries)
    return Installed(ours, search.diagnostics, search.copies)


def _record_of(copies: list[Copy], search: Search) -> Record | None:
    """Read the copy that counts, or else the next that can be read; None if none can."""
    ordered = _by_preference(copies)
    for copy in ordered:
        if copy.failed:
            continue
        try:
            record = _read(copy, search)
        except Exception as error:  # noqa: BLE001 - one guarded call per distribution, see the module's docstring
            search.failed(copy, error)
            continue
        search.diagnostics.extend(
            _differing(record, copy, (other for other in ordered if other is not copy), search)
        )
        return record
    return None


def _differing(record: Record, chosen: Copy, others: Iterable[Copy], search: Search) -> Iterator[Diagnostic]:
    """What to say of the other copies of a distribution."""
    for other in others:
        if other.failed or (
            other.is_egg and record.editable and _lies_in(other.folder.location, record.path)
        ):
            continue  # (setuptools leaves an egg-info in the source of an editable install)
        try:
            version = other.fields().version
        except Exception as error:  # noqa: BLE001 - one guarded call per distribution, see the module's docstring
            search.failed(other, error)
            continue
        if version != record.version:
            what = f"version {version}"
        elif other.entry_points.split() != chosen.entry_points.split():
            what = "the same version with other entry points"
        else:
            continue
        message = (
            f"{record.name} {record.version} ({record.info}) is used; {what} is on the path too "
            f"({other.folder.info}): remove the one that you do not mean"
        )
        yield Diagnostic("warning", "installed-twice", message, record.name, other.folder.info)


def _lies_in(path: str, folder: str) -> bool:
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


def _by_preference(copies: Iterable[Copy]) -> list[Copy]:
    """What is installed (dist-info) before a build's leftover (egg-info), then as Python imports: by order
    of the path. In one folder, where that says nothing, the newest first.
    """
    ordered = sorted(copies, key=lambda copy: copy.base)
    if len({(copy.is_egg, copy.place) for copy in ordered}) < len(ordered):
        ordered.sort(key=_age, reverse=True)
    ordered.sort(key=lambda copy: (copy.is_egg, copy.place))
    return ordered


def _age(copy: Copy) -> tuple[bool, Any]:
    from packaging.version import InvalidVersion, Version

    try:
        return True, Version(_version(copy) or "")
    except InvalidVersion:
        return False, Version("0")


def _version(copy: Copy) -> str | None:
    try:
        return copy.fields().version
    except Exception:  # noqa: BLE001 - a stranger's metadata can fail in any way; then it states no version
        return None


def _read(copy: Copy, search: Search) -> Record:
    folder = copy.folder
    fields = copy.fields()
    name, version = fields.name, fields.version
    if not name or not version:
        raise MetadataError(f"its metadata states no {'Version' if name else 'Name'}")

    def odd(level: str, code: str, message: str) -> None:
        search.diagnostics.append(Diagnostic(level, code, f"{name} {version}: {message}", name, folder.info))

    if copy.entry_points.startswith(_UTF8_MARK):
        said = "entry_points.txt starts with a byte order mark, so other tools skip its first section"
        odd("warning", "byte-order-mark", f"{said}; save it without one, and reinstall")
    text = decode(ENTRY_POINTS, copy.entry_points.removeprefix(_UTF8_MARK))
    # Spaces inside the brackets make another group, which no one asks for: it is told as misnamed.
    entries = tuple(entry for entry in parse_entry_points(text) if entry[0].strip().startswith(PREFIX))
    try:
        direct_url = folder.read("direct_url.json")
        text_of_url = None if direct_url is None else decode("direct_url.json", direct_url)
        editable, origin, path = origin_of(text_of_url, folder.location, is_egg=copy.is_egg)
        if direct_url is not None and not f"{origin}{path}".isprintable():
            raise ValueError("its url has characters that cannot be printed")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        editable, origin, path = False, "unknown", folder.location
        said = f"direct_url.json cannot be read ({say(error)}), so its origin is unknown"
        odd("warning", "unreadable-origin", f"{said}; reinstall it")
    if copy.is_egg and linked_source(search.egg_links, copy.name, path):
        editable, origin = True, f"editable {path}"
    if editable and not os.path.isdir(path):
        said = f"its editable install points to {path}, which does not exist"
        mend = f"install it again from where its source is now, or run: pip uninstall {name}"
        odd("error", "missing-source", f"{said}; {mend}")
    return Record(name, version, path, editable, origin, fields.requires, entries, folder.info)
