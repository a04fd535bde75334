"""Reads the metadata of installed distributions. Imports none of them, and no stranger's broken metadata
stops it.

A distribution whose entry_points.txt does not contain `mm_core.` costs one small file read and is not parsed.
Every access to one distribution's files is guarded: what fails becomes a `Diagnostic`, the others go on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

import importlib_metadata

from mm_registry.groups import PREFIX
from mm_registry.spec import Diagnostic, canonical_name


@dataclass(frozen=True, slots=True)
class Record:
    """One distribution that declares entries of ours; `entries` are (group, name, value) as written."""

    name: str
    version: str
    path: str
    editable: bool
    origin: str
    requires: tuple[str, ...]
    entries: tuple[tuple[str, str, str], ...]


@dataclass(slots=True)
class _Found:
    """A metadata folder that was found; `info` is its path, empty if a custom finder gives none."""

    dist: importlib_metadata.IDistribution
    info: str
    name: str
    entry_points: str = ""
    failed: bool = False

    @property
    def is_egg(self) -> bool:
        return self.info.lower().endswith("egg-info")


@dataclass(slots=True)
class Installed:
    """Every distribution on the path by canonical name, those that declare entries of ours as records, and
    what was odd.
    """

    records: list[Record] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    _found: dict[str, list[_Found]] = field(default_factory=dict)

    def version(self, distribution: str) -> str | None:
        """The installed version of a distribution; None if it is not installed or does not say."""
        found = min(self._found.get(canonical_name(distribution), []), key=_preference, default=None)
        if found is None:
            return None
        try:
            return found.dist.version
        except Exception:  # noqa: BLE001 - a stranger's metadata can fail in any way; then it states no version
            return None


def read_installed(path: Sequence[str]) -> Installed:
    """Read the distributions on `path` (entries as in `sys.path`)."""
    # A package installed a moment ago may share its folder's time stamp with the last listing.
    importlib_metadata.MetadataPathFinder.invalidate_caches()
    installed = Installed()
    for found in _search(path, installed.diagnostics):
        installed._found.setdefault(found.name, []).append(found)
    for name in sorted(installed._found):
        copies = installed._found[name]
        if not any(PREFIX in copy.entry_points for copy in copies):
            continue
        record = _record_of(copies, installed.diagnostics)
        if record is not None and record.entries:
            installed.records.append(record)
    return installed


def _search(path: Sequence[str], diagnostics: list[Diagnostic]) -> Iterator[_Found]:
    """Yield each metadata folder once, in the order of `path`, with its entry_points.txt read."""
    seen: set[str] = set()
    for folder in dict.fromkeys(os.path.abspath(entry) for entry in path if isinstance(entry, str)):
        try:
            dists = list(importlib_metadata.distributions(path=[folder]))
        except Exception as error:  # noqa: BLE001 - a broken finder or archive must not hide the rest of the path
            message = f"{folder} cannot be searched for distributions: {_say(error)}"
            diagnostics.append(Diagnostic("error", "unreadable-path", message, "", folder))
            continue
        for dist in dists:
            info = str(getattr(dist, "_path", ""))
            place = os.path.realpath(info) if info else f"{id(dist)}"
            if place in seen:
                continue
            seen.add(place)
            if os.path.basename(info).startswith("~"):
                continue  # what an interrupted pip leaves behind; pip does not count it as installed either
            found = _Found(dist, info, _stem(info))
            try:
                found.name = found.name or canonical_name(dist.name)
                found.entry_points = dist.read_text("entry_points.txt") or ""
            except Exception as error:  # noqa: BLE001 - one guarded call per distribution, see the module's docstring
                found.failed = True
                diagnostics.append(_unreadable(found, error))
            if found.name:
                yield found


def _record_of(copies: list[_Found], diagnostics: list[Diagnostic]) -> Record | None:
    """Read the copy that counts, or else the next that can be read; None if none can."""
    for found in sorted(copies, key=_preference):
        if found.failed:
            continue
        try:
            record = _read(found, diagnostics)
        except Exception as error:  # noqa: BLE001 - one guarded call per distribution, see the module's docstring
            found.failed = True
            diagnostics.append(_unreadable(found, error))
            continue
        diagnostics.extend(_differing(record, found, (copy for copy in copies if copy is not found)))
        return record
    return None


def _differing(record: Record, chosen: _Found, others: Iterable[_Found]) -> Iterator[Diagnostic]:
    """What to say of the other copies of a distribution."""
    for other in others:
        if other.failed:
            continue
        try:
            version = other.dist.version
        except Exception as error:  # noqa: BLE001 - one guarded call per distribution, see the module's docstring
            yield _unreadable(other, error)
            continue
        if version != record.version:
            what = f"version {version}"
        elif other.entry_points.split() != chosen.entry_points.split():
            what = "the same version with other entry points"
        else:
            continue
        message = (
            f"{record.name} {record.version} ({chosen.info}) is used; {what} is on the path too "
            f"({other.info}): remove the one that you do not mean"
        )
        yield Diagnostic("warning", "installed-twice", message, record.name, other.info)


def _preference(copy: _Found) -> bool:
    """Sorting key: what is installed (dist-info) before a build's leftover (egg-info), then path order."""
    return copy.is_egg


def _read(found: _Found, diagnostics: list[Diagnostic]) -> Record:
    dist = found.dist
    metadata = dist.metadata
    name, version = metadata.get("Name"), metadata.get("Version")
    if not name or not version:
        raise ValueError(f"its metadata states no {'Version' if name else 'Name'}")
    entries = tuple((e.group, e.name, e.value) for e in dist.entry_points if e.group.startswith(PREFIX))
    location = os.path.abspath(str(dist.locate_file("")))
    try:
        editable, origin, path = _origin(dist.read_text("direct_url.json"), location, found.is_egg)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        editable, origin, path = False, "unknown", location
        message = f"{name} {version}: direct_url.json cannot be read ({_say(error)}): its origin is unknown"
        diagnostics.append(Diagnostic("warning", "unreadable-origin", message, name, found.info))
    return Record(name, version, path, editable, origin, tuple(dist.requires or ()), entries)


def _origin(direct_url: str | None, location: str, is_egg: bool) -> tuple[bool, str, str]:
    """(editable, origin, path) from direct_url.json (PEP 610), which installs from an index do not have."""
    if direct_url is None:
        return (False, f"source {location}", location) if is_egg else (False, "wheel", location)
    data: dict[str, Any] = json.loads(direct_url)
    parts = urlsplit(data["url"])
    where = url2pathname(parts.path) if parts.scheme == "file" else _without_password(data["url"])
    if "dir_info" in data:
        if data["dir_info"].get("editable"):
            return True, f"editable {where}", where
        return False, f"local {where}", location
    if "vcs_info" in data:
        vcs = data["vcs_info"]
        return False, f"{vcs['vcs']}+{where}@{vcs.get('commit_id', '')[:12]}", location
    return False, f"{'wheel' if where.endswith('.whl') else 'archive'} {where}", location


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _stem(info: str) -> str:
    """The canonical name in a metadata folder's name; `foo-1.0.egg/EGG-INFO` is named by its parent."""
    base = os.path.basename(info.rstrip("/\\"))
    if base.lower() == "egg-info":
        base = os.path.basename(os.path.dirname(info.rstrip("/\\")))
    return canonical_name(base.rpartition(".")[0].partition("-")[0])


def _unreadable(found: _Found, error: Exception) -> Diagnostic:
    where = found.info or repr(found.dist)
    message = (
        f"the metadata of {found.name or 'a distribution'} ({where}) cannot be read: {_say(error)}; "
        "reinstall or remove it"
    )
    return Diagnostic("error", "unreadable-metadata", message, found.name, found.info)


def _say(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
