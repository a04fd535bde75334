"""Where checkpoints are, and which of them are complete.

    <run>/checkpoints/iter_0000010/    __0_0.distcp, .metadata, state.json, rng-00000.safetensors, .complete
    <run>/checkpoints/latest           the name of the newest one, for people and scripts
    <run>/checkpoints/.tmp-iter_…      being written, or left behind by a crash

A checkpoint is complete when it has `.complete`, a JSON list of its files with their sizes and checksums. The
folder gets its final name after that, by one rename: a folder named `iter_…` without marker was not written
by us to its end.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mm_core.weights.errors import WeightsError

MARKER = ".complete"
LATEST = "latest"
TEMPORARY = ".tmp-"
_NAME = re.compile(r"iter_(\d+)")
_QUICK = 1 << 20  # bytes; larger files are read through only when their tensors are wanted


def folder_name(iteration: int) -> str:
    """`iter_0000010` for 10."""
    return f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """The inverse of `folder_name`, for one of the folders that `complete_checkpoints` returns."""
    return int(checkpoint.name.removeprefix("iter_"))


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders with a marker in a run's folder (or `checkpoints` folder), oldest first."""
    return [folder for folder in _iterations(_checkpoints_of(run)) if (folder / MARKER).is_file()]


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint with a marker, or `None`. Markers decide; the text in `latest` is not read."""
    complete = complete_checkpoints(run)
    return complete[-1] if complete else None


def resolve_load(path: Path, *, flag: str = "--load") -> Path:
    """The checkpoint folder that `--load` means: a run's newest, a `checkpoints` folder's newest, or the one
    given.

    Args:
        flag: that names it, for messages.

    Raises:
        WeightsError: there is no such folder, no complete checkpoint in it, or its files are not those that
            were written.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{flag} {path}: no such folder.{_closest(path)}")
    if not path.is_dir():
        raise WeightsError(f"{flag} {path}: this is a file; give a run's folder or one checkpoint in it.")
    if _NAME.fullmatch(path.name) or (path / MARKER).exists() or (path / ".metadata").exists():
        verify(path)
        return path
    found = latest_checkpoint(path)
    if found is None:
        unfinished = _unfinished(_checkpoints_of(path))
        what = (
            f"it has only unfinished ones ({', '.join(unfinished)}), "
            "left by a run that was stopped while saving"
            if unfinished
            else "the folder has no iter_… with a .complete marker in it or in its checkpoints folder"
        )
        raise WeightsError(f"{flag} {path}: no complete checkpoint; {what}.")
    verify(found)
    return found


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check a checkpoint's files against its marker, quickly: all there, sizes right, small ones unchanged.
    `verify_contents` does the rest. Returns the marker.

    Raises:
        WeightsError: it is unfinished or damaged; the message names the newest older one, if there is one.
    """
    marker = checkpoint / MARKER
    try:
        content: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        files: Mapping[str, Mapping[str, Any]] = content["files"]
        written = {name: (int(entry["bytes"]), entry.get("blake2b")) for name, entry in files.items()}
    except FileNotFoundError:
        raise WeightsError(
            f"{checkpoint} is unfinished: it has no {MARKER} marker.{older(checkpoint)}"
        ) from None
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise WeightsError(f"{marker} cannot be read ({error}).{older(checkpoint)}") from error
    for name, (size, expected) in written.items():
        file = checkpoint / name
        if Path(name).name != name:
            raise WeightsError(f"{marker}: {name!r} points outside the checkpoint; refused.")
        if not file.is_file():
            raise WeightsError(f"{checkpoint} is damaged: {name} is missing.{older(checkpoint)}")
        if file.stat().st_size != size:
            raise WeightsError(
                f"{checkpoint} is damaged: {name} has {file.stat().st_size} bytes, {size} were written."
                f"{older(checkpoint)}"
            )
        if size <= _QUICK:
            _compare(checkpoint, name, expected)
    return content


def verify_contents(checkpoint: Path, part: int = 0, parts: int = 1) -> None:
    """Do what `verify` does, and read the large files through too; of these, only each `parts`-th from
    `part` on, so that ranks can share the work. A marker of an older version has no checksums of them.

    Raises:
        WeightsError: as `verify`.
    """
    files = verify(checkpoint)["files"]
    large = sorted(name for name, entry in files.items() if int(entry["bytes"]) > _QUICK)
    for name in large[part::parts]:
        _compare(checkpoint, name, files[name].get("blake2b"))


def write_marker(folder: Path, iteration: int, checksums: Mapping[str, str] | None = None) -> None:
    """Write the marker of a folder whose files are all there and on disk.

    Args:
        checksums: file name -> `checksum`, of the files that are not to be read again here.
    """
    known = checksums or {}
    files = {
        file.name: {"bytes": file.stat().st_size, "blake2b": known.get(file.name) or checksum(file)}
        for file in sorted(folder.iterdir())
    }
    write_text(folder / MARKER, json.dumps({"format": 1, "iteration": iteration, "files": files}, indent=1))


def new_digest() -> hashlib.blake2b:
    """What `checksum` computes with: BLAKE2b of 128 bits."""
    return hashlib.blake2b(digest_size=16)


def checksum(file: Path, *, from_disk: bool = False) -> str:
    """BLAKE2b of a file's bytes, 128 bits in hexadecimal.

    Args:
        from_disk: forget what memory has of the file first, where the system can: for a file that was just written.
    """
    with file.open("rb") as stream:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(stream, new_digest).hexdigest()


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, then point `latest` at it.

    Each is one rename, so no reader sees half of either.
    """
    sync_folder(temporary)
    os.rename(temporary, final)
    sync_folder(final.parent)
    pointer = final.parent / f"{TEMPORARY}{LATEST}"
    write_text(pointer, final.name + "\n")
    os.replace(pointer, final.parent / LATEST)
    sync_folder(final.parent)


def prepare(checkpoints: Path, iteration: int) -> Path:
    """Make an empty folder to write a checkpoint into, and return it.

    Raises:
        WeightsError: a complete checkpoint of this iteration exists; it is never overwritten.
    """
    final = checkpoints / folder_name(iteration)
    if (final / MARKER).exists():
        raise WeightsError(
            f"{final} exists already and is complete; it is not overwritten. "
            "Save to another folder, or move it away."
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    if final.exists():  # never finished; out of the way, and gone with the next start's cleaning
        shutil.rmtree(checkpoints / f"{TEMPORARY}unfinished-{final.name}", ignore_errors=True)
        os.rename(final, checkpoints / f"{TEMPORARY}unfinished-{final.name}")
    temporary = checkpoints / f"{TEMPORARY}{final.name}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    return temporary


def remove_temporaries(run: Path) -> list[str]:
    """Remove what a crash left behind (`.tmp-…`).

    One process calls this, while it holds the run. Returns the names.
    """
    removed = []
    for path in sorted(_checkpoints_of(run).glob(f"{TEMPORARY}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path.name)
    return removed


def write_text(path: Path, text: str) -> None:
    """Write a small file and wait until it is on disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def let_others_read(file: Path) -> None:
    """Give a file the mode of any other new one here: safetensors makes its files readable by their owner alone, while
    folders of features are shared.
    """
    probe = file.with_name(f"{TEMPORARY}mode-{os.getpid()}-{file.name}")
    with suppress(OSError):  # not every file system has modes
        try:
            probe.touch()
            file.chmod(stat.S_IMODE(probe.stat().st_mode))
        finally:
            probe.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints_of(run: Path) -> Path:
    return run / "checkpoints" if (run / "checkpoints").is_dir() else Path(run)


def _iterations(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    found = [
        (int(match.group(1)), p)
        for p in checkpoints.iterdir()
        if (match := _NAME.fullmatch(p.name)) and p.is_dir()
    ]
    return [path for _, path in sorted(found)]


def _unfinished(checkpoints: Path) -> list[str]:
    bare = [p.name for p in _iterations(checkpoints) if not (p / MARKER).is_file()]
    return bare + sorted(p.name for p in checkpoints.glob(f"{TEMPORARY}*iter_*"))


def older(checkpoint: Path) -> str:
    """Advice to end a message with: the newest complete checkpoint beside a bad one."""
    others = [p for p in complete_checkpoints(checkpoint.parent) if p.name != checkpoint.name]
    before = [p for p in others if p.name < checkpoint.name] or others
    return f" An older complete one: --load {before[-1]}" if before else ""


def _compare(checkpoint: Path, name: str, expected: str | None) -> None:
    if expected is not None and expected != checksum(checkpoint / name):
        raise WeightsError(
            f"{checkpoint} is damaged: {name} was changed after it was written.{older(checkpoint)}"
        )


def _closest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f" Closest: {parent / near[0]}" if near else ""
