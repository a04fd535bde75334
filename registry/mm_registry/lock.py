"""The lock: which distributions a project was made with, to the contents of their files, and what is otherwise
now.

    {"format": 1, "fingerprint": "…", "distributions": [{"name": …, "version": …, "origin": …, "editable": …,
     "selected": …, "contents": {"of": "RECORD", "sha256": …}, "ids": {group: {id: target}}}, …]}

Imports no plugin.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mm_registry.contents import FILES, damaged_files, digest_of
from mm_registry.errors import RegistryError
from mm_registry.groups import GROUPS
from mm_registry.spec import canonical_name
from mm_registry.words import described, shown, visible

if TYPE_CHECKING:
    from mm_registry.discovery import Record
    from mm_registry.manager import PluginManager

_T = TypeVar("_T")
_LONGEST = 4096  # characters of a name, a target, a path
_SHOWN = 20  # differences in one message
NAME = "mmzoo.lock"
FORMAT = 1
_REGISTRY = "mmzoo-registry"  # it has no entries, but decides what those of the others mean


class LockError(RegistryError):
    """There is no usable lock, or what is installed is not what it says; then `drift` tells how."""

    def __init__(self, message: str, drift: tuple[Drift, ...] = ()) -> None:
        super().__init__(message)
        self.drift = drift


@dataclass(frozen=True, slots=True)
class Locked:
    """One distribution, as installed or as locked.

    Attributes:
        name, version, origin, editable: as in `EntrySpec`.
        selected: whether it takes part (`MM_PLUGINS`, selection files).
        contents_of: `RECORD`, `files` (of an editable install), or `nothing`; see `mm_registry.contents`.
        sha256: of these.
        ids: group -> id -> target.
    """

    name: str
    version: str
    origin: str
    editable: bool
    selected: bool
    contents_of: str
    sha256: str
    ids: Mapping[str, Mapping[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds of it."""
        return {
            "name": self.name,
            "version": self.version,
            "origin": self.origin,
            "editable": self.editable,
            "selected": self.selected,
            "contents": {"of": self.contents_of, "sha256": self.sha256},
            "ids": {group: dict(sorted(ids.items())) for group, ids in sorted(self.ids.items())},
        }

    @property
    def install_line(self) -> str:
        """The command that brings it back."""
        kind, _, place = self.origin.partition(" ")
        if self.editable or kind == "source":
            return f"pip install -e {shlex.quote(place)}"
        if kind in ("local", "wheel", "archive") and place:
            return f"pip install {shlex.quote(place)}"
        if "+" in kind and "@" in self.origin:
            return f"pip install {_quoted(self.origin)}"
        return f"pip install {_quoted(f'{self.name}=={self.version}')}"


@dataclass(frozen=True, slots=True)
class Lock:
    """Distributions by canonical name, and the fingerprint of what ids mean."""

    distributions: Mapping[str, Locked]
    fingerprint: str

    def to_text(self) -> str:
        """Return the file: the same for the same installation, whenever it is written."""
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "distributions": [self.distributions[name].to_dict() for name in sorted(self.distributions)],
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference between a lock and what is installed.

    Attributes:
        kind: `missing`, `added`, `version`, `editable`, `contents`, `ids`, `selection`, `meaning`, or `file`.
        distribution: its name; empty for `meaning`.
        message: the difference in words.
        mend: the command that undoes it; empty if there is none.
    """

    kind: str
    distribution: str
    message: str
    mend: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.message}; run: {self.mend}" if self.mend else self.message


def current_lock(manager: PluginManager) -> Lock:
    """Return the lock of what is installed now.

    Raises:
        LockError: a file of an editable install cannot be read.
    """
    found: dict[str, Locked] = {}
    for record in _records(manager):
        try:
            contents_of, sha256 = digest_of(record)
        except OSError as error:
            raise LockError(
                f"{record.name} {record.version}: {error.filename} cannot be read ({error.strerror}), "
                "so its contents cannot be locked"
            ) from error
        ids: dict[str, dict[str, str]] = {}
        for group, id, target in record.entries:
            ids.setdefault(visible(group), {})[visible(id)] = visible(target)
        found[canonical_name(record.name)] = Locked(
            record.name,
            record.version,
            visible(record.origin),
            record.editable,
            manager.selection.excludes(record.name) is None,
            contents_of,
            sha256,
            ids,
        )
    return Lock(found, manager.fingerprint())


def read_lock(path: Path) -> Lock:
    """Read a lock file.

    Raises:
        LockError: there is none, or it is no lock.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise LockError(f"{path}: the lock file cannot be read (it is no file but a pipe or a device)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LockError(
            f"{path}: there is no such lock file; write it with `mm plugin lock --output {path}`"
        ) from None
    except OSError as error:
        raise LockError(f"{path}: the lock file cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _garbled(path, f"it is not JSON ({described(error)})") from error
    number = content.get("format") if isinstance(content, dict) else None
    if number != FORMAT:
        raise _garbled(path, f"its format is {shown(number)}, and this version reads {FORMAT}")
    try:
        distributions = [_locked(entry) for entry in content["distributions"]]
        fingerprint = content["fingerprint"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _garbled(path, described(error)) from error
    by_name = {canonical_name(locked.name): locked for locked in distributions}
    if len(by_name) < len(distributions):
        raise _garbled(path, "it names a distribution twice")
    return Lock(by_name, str(fingerprint))


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock file in one move.

    Raises:
        LockError: it cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    temporary = target.with_name(f".tmp-{target.name}") if target.name else target
    try:
        # What replaces a device, /dev/stdout say, would harm more than help.
        if target.exists() and not target.is_file():
            raise LockError(f"{path}: the lock file cannot be written (it is no file)")
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lock.to_text())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise LockError(f"{path}: the lock file cannot be written ({error.strerror})") from error


def compare(lock: Lock, now: Lock, *, called: str = "the lock") -> tuple[Drift, ...]:
    """Return how `now` differs from `lock`, by distribution; empty if it does not. Messages call the lock
    `called`.
    """
    found: list[Drift] = []
    for name in sorted(lock.distributions.keys() | now.distributions.keys()):
        locked, installed = lock.distributions.get(name), now.distributions.get(name)
        if installed is None and locked is not None:
            message = f"{locked.name} {locked.version} is not installed, {called} has it"
            found.append(Drift("missing", locked.name, message, locked.install_line))
        elif locked is None and installed is not None:
            message = f"{installed.name} {installed.version} is installed, {called} does not have it"
            found.append(Drift("added", installed.name, message, f"pip uninstall {installed.name}"))
        elif locked is not None and installed is not None:
            found += _compare(locked, installed, called)
    if not found and lock.fingerprint != now.fingerprint:
        message = (
            f"the distributions are those of {called}, but ids mean something else: a `prefer` of a selection "
            "file, or an extra's requirements, changed (`mm plugin explain ID` tells)"
        )
        found.append(Drift("meaning", "", message))
    return tuple(found)


def changed_files(manager: PluginManager) -> tuple[Drift, ...]:
    """Return the installed files that are not as their distribution's RECORD says."""
    return tuple(
        Drift("file", record.name, f"{record.name} {record.version}: {phrase}", _reinstall(record))
        for record in _records(manager)
        for phrase in damaged_files(record)
    )


def require_lock(path: Path, manager: PluginManager) -> None:
    """Return if what is installed is what a lock says.

    Raises:
        LockError: it is not, or there is no usable lock.
    """
    drift = compare(read_lock(path), current_lock(manager))
    if drift:
        lines = [f"  {line}" for line in drift[:_SHOWN]]
        if len(drift) > _SHOWN:
            lines.append(
                f"  … and {len(drift) - _SHOWN} more (`mm plugin verify --lock-file {path}` has all)"
            )
        listed = "\n".join(lines)
        raise LockError(
            f"--locked: the installed plugins are not those of {path}:\n{listed}\n"
            f"Put them back, or accept what is installed: mm plugin lock --output {path}",
            drift,
        )


def _records(manager: PluginManager) -> list[Record]:
    records = list(manager.distributions())
    own = _own_record() if manager.version(_REGISTRY) is not None else None
    if own is not None and manager.record(_REGISTRY) is None:
        records.append(own)
    return records


def _own_record() -> Record | None:
    from importlib import metadata

    from mm_registry.discovery import Record
    from mm_registry.origin import origin_of

    try:
        distribution = metadata.distribution(_REGISTRY)
    except metadata.PackageNotFoundError:
        return None
    info = str(getattr(distribution, "_path", ""))
    location = os.path.abspath(str(distribution.locate_file("")))
    try:
        editable, origin, path = origin_of(
            distribution.read_text("direct_url.json"), location, is_egg=info.lower().endswith("egg-info")
        )
    except (ValueError, TypeError, AttributeError, KeyError):
        editable, origin, path = False, "unknown", location
    return Record(_REGISTRY, distribution.version, path, editable, origin, (), (), info)


def _compare(locked: Locked, installed: Locked, called: str) -> list[Drift]:
    name, mend = locked.name, locked.install_line
    found = []
    if locked.version != installed.version:
        message = f"{name} is {installed.version}, {called} says {locked.version}"
        if locked.editable:
            mend += f"  # with {locked.version} checked out there"
        found.append(Drift("version", name, message, mend))
    elif locked.editable != installed.editable:
        now, before = (
            ("an editable install", "a package")
            if installed.editable
            else ("a package", "an editable install")
        )
        message = f"{name} {installed.version} is {now}, {called} has {before}"
        found.append(Drift("editable", name, message, mend))
    else:
        found += [Drift("ids", name, line, mend) for line in _compare_ids(locked, installed, called)]
        if (locked.contents_of, locked.sha256) != (installed.contents_of, installed.sha256):
            if installed.contents_of == FILES:
                message = f"the source files of {name} {installed.version} ({installed.origin}) were changed"
                found.append(Drift("contents", name, message))
            else:
                message = f"{name} {installed.version} has other files than {called} says (RECORD differs)"
                found.append(Drift("contents", name, message, f"{mend} --force-reinstall"))
    if locked.selected != installed.selected:
        message = (
            f"{name} takes part, {called} has it left out"
            if installed.selected
            else f"{name} is left out by MM_PLUGINS or a selection file, {called} has it in use"
        )
        found.append(Drift("selection", name, message))
    return found


def _compare_ids(locked: Locked, installed: Locked, called: str) -> list[str]:
    before = {(group, id): target for group, ids in locked.ids.items() for id, target in ids.items()}
    now = {(group, id): target for group, ids in installed.ids.items() for id, target in ids.items()}
    lines = []
    for key in sorted(before.keys() | now.keys()):
        group, id = key
        what = f"{GROUPS[group].noun if group in GROUPS else group} {id}"
        if key not in now:
            lines.append(f"{locked.name} does not offer the {what}, {called} has it")
        elif key not in before:
            lines.append(f"{locked.name} offers the {what}, {called} does not have it")
        elif before[key] != now[key]:
            lines.append(f"the {what} of {locked.name} is {now[key]}, {called} says {before[key]}")
    return lines


def _reinstall(record: Record) -> str:
    return f"pip install --force-reinstall --no-deps {_quoted(f'{record.name}=={record.version}')}"


def _quoted(text: str) -> str:
    """In quotes for a shell, needed or not; `text` may come from a lock that someone else wrote."""
    inner = text.replace("'", "'\"'\"'")
    return f"'{inner}'"


def _locked(entry: Mapping[str, Any]) -> Locked:
    ids = entry["ids"]
    contents = entry["contents"]
    return Locked(
        _of(str, entry["name"]),
        _of(str, entry["version"]),
        _of(str, entry["origin"]),
        _of(bool, entry["editable"]),
        _of(bool, entry["selected"]),
        _of(str, contents["of"]),
        _of(str, contents["sha256"]),
        {group: {id: _of(str, target) for id, target in named.items()} for group, named in ids.items()},
    )


def _of(kind: type[_T], value: Any) -> _T:
    """A value, if it is of that kind; a text must be one that can be shown on a line."""
    if not isinstance(value, kind):
        raise TypeError(f"{shown(value)} is not of type {kind.__name__}")
    if isinstance(value, str) and (len(value) > _LONGEST or not value.isprintable()):
        raise ValueError(f"{shown(value)} is too long, or has characters that cannot be printed")
    return value


def _garbled(path: Path, why: str) -> LockError:
    return LockError(f"{path} is no lock file: {why}; write it anew with `mm plugin lock --output {path}`")
