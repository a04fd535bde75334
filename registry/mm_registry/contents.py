"""What an installed distribution consists of: a digest of its files, and files that are not as installed.

An installed package is known by RECORD, which lists each file with its hash. An editable install's RECORD says
nothing of the source tree, so that is read itself. Imports no plugin.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import importlib.util
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_registry.words import visible

if TYPE_CHECKING:
    from mm_registry.discovery import Record

RECORD = "RECORD"
FILES = "files"
NOTHING = "nothing"
# Written by the installer, not by the package: they differ between machines that hold the same files.
_INSTALLERS = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json")
_HASHES = ("sha256", "sha384", "sha512")


def digest_of(record: Record) -> tuple[str, str]:
    """Return (what was read, sha256 of it).

    `RECORD`: its lines without what the installer adds (compiled files, scripts outside the packages, its own
    notes), so that one wheel gives one digest everywhere. `files`: names and contents of the source files of an
    editable install, or of one without RECORD. `nothing`: neither could be found.

    Raises:
        OSError: a source file cannot be read.
    """
    lines = None if record.editable else _record_lines(record)
    if lines is not None:
        kept = sorted(
            f"{path},{digest},{size}\n" for path, digest, size in lines if _is_packaged(path, record)
        )
        return RECORD, hashlib.sha256("".join(kept).encode()).hexdigest()
    digest = hashlib.sha256()
    found = False
    for package, folder in source_packages(record):
        for name, file in _files_below(folder):
            found = True
            content = _hash_of(file, "sha256").hex()
            digest.update(f"{package}/{name},{content}\n".encode("utf-8", "surrogateescape"))
    return (FILES, digest.hexdigest()) if found else (NOTHING, "")


def damaged_files(record: Record) -> list[str]:
    """Say, one phrase each, which files differ from RECORD, are missing, or lie in its packages unlisted; nothing
    for an editable install, whose files are its source.
    """
    lines = None if record.editable else _record_lines(record)
    if lines is None:
        return []
    root = Path(record.info).parent
    odd = []
    for path, wanted, _ in lines:
        algorithm, _, value = wanted.partition("=")
        if algorithm not in _HASHES:
            continue  # compiled files and RECORD itself are listed without
        try:
            content = _hash_of(root / path, algorithm)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            odd.append(f"{visible(path)} cannot be read ({reason})")
            continue
        found = base64.urlsafe_b64encode(content).decode().rstrip("=")
        if found != value.rstrip("="):
            odd.append(f"{visible(path)} was changed after it was installed")
    listed = {os.path.normpath(path) for path, _, _ in lines}
    for package in _packages(record):
        for name, _ in _files_below(root / package):
            if os.path.normpath(f"{package}/{name}") not in listed:
                odd.append(f"{visible(f'{package}/{name}')} was not installed with it")
    return sorted(odd)


def source_packages(record: Record) -> list[tuple[str, Path]]:
    """Return (name, folder or file) of each top-level package of a distribution that Python would import, found
    without importing it.
    """
    found: list[tuple[str, Path]] = []
    for package in _packages(record):
        places = _places_of_import(package)
        for folder in (Path(record.path), Path(record.path) / "src"):
            places += [path for path in (folder / package, folder / f"{package}.py") if path.exists()]
        if places:
            found.append((package, places[0]))
    return found


def _packages(record: Record) -> list[str]:
    """Top-level names of what its entries point to, and of what its build tool notes."""
    names = {
        value.partition(":")[0].partition(".")[0].strip() for _, _, value in record.entries if ":" in value
    }
    names |= set((_text(Path(record.info) / "top_level.txt") or "").split()) if record.info else set()
    return sorted(name for name in names if name.isidentifier())


def _places_of_import(package: str) -> list[Path]:
    try:
        spec: Any = importlib.util.find_spec(package)
    except (ImportError, ValueError, AttributeError):  # a finder that is broken, or a module without a spec
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(place) for place in spec.submodule_search_locations if os.path.isdir(place)]
    return [Path(spec.origin)] if spec.origin and os.path.isfile(spec.origin) else []


def _files_below(place: Path) -> Iterator[tuple[str, Path]]:
    """(path relative to it, file), sorted; without compiled and hidden ones."""
    if place.is_file():
        yield place.name, place
        return
    found = []
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        for name in files:
            if not name.endswith((".pyc", ".pyo")) and not name.startswith("."):
                file = Path(folder, name)
                if not _is_special(file):
                    found.append((file.relative_to(place).as_posix(), file))
    yield from sorted(found)


def _record_lines(record: Record) -> list[tuple[str, str, str]] | None:
    """(path, hash, size) of RECORD; None if there is none that can be read."""
    text = _text(Path(record.info) / RECORD) if record.info else None
    if text is None:
        return None
    try:
        rows = [row for row in csv.reader(text.splitlines()) if row]
    except csv.Error:
        return None
    return [(row[0], row[1], row[2]) if len(row) >= 3 else (row[0], "", "") for row in rows]


def _is_packaged(path: str, record: Record) -> bool:
    folder, _, name = path.rpartition("/")
    if path.endswith((".pyc", ".pyo")) or path.startswith(("../", "/")):
        return False
    return folder != os.path.basename(record.info.rstrip("/\\")) or name not in _INSTALLERS


def _text(file: Path) -> str | None:
    try:
        return None if _is_special(file) else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _hash_of(file: Path, algorithm: str) -> bytes:
    """Raises OSError or ValueError: it cannot be read."""
    if _is_special(file):
        raise OSError(errno.EINVAL, "it is no file but a pipe, a socket or a device", str(file))
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).digest()


def _is_special(file: Path) -> bool:
    """Whether reading it could wait for ever; False if there is nothing."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
