"""`mm plugin lock` and `mm plugin verify`: write down which plugins are installed, and compare with that later.
Neither imports a plugin, nor torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_core.cli.options import output_format, take_option
from mm_core.config.findings import ConfigError, Finding
from mm_registry import PluginManager, default_manager
from mm_registry.lock import (
    NAME,
    Drift,
    Lock,
    LockError,
    changed_files,
    compare,
    current_lock,
    read_lock,
    write_lock,
)

_LOCK_HELP = f"""\
usage: mm plugin lock [--output FILE] [--format table|json]

Write the distributions that offer ids of ours, the core included, with version, origin, a digest of their files
and their ids: of RECORD for an installed package, of the source files for an editable install. The file (by
default {NAME}) holds nothing that differs from one writing to the next; keep it with the project.
`mm plugin verify` and `mm train --locked` compare with it.
"""
_VERIFY_HELP = f"""\
usage: mm plugin verify [--lock-file FILE] [--files] [--format table|json]

Compare what is installed with the lock (by default {NAME}). --files also compares each installed file with the
hash in RECORD, and names files in the packages that are not listed there.
The exit code is 2 if anything differs.
"""


def lock(argv: list[str]) -> int:
    """Write the lock, say what changed in it, and return 0.

    Raises:
        UserError: a wrong command line, or the file cannot be written.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_LOCK_HELP)
        return 0
    form, rest = output_format(argv, ("table", "json"))
    output, rest = take_option(rest, "--output")
    _refuse_stray(rest, "mm plugin lock")
    path = Path(output or NAME)
    manager = default_manager()
    now = current_lock(manager)
    _warn_of_unreadable(manager)
    before, unusable = _older(path)
    changes = compare(before, now, called="the older lock") if before is not None else ()
    same = before is not None and before.to_text() == now.to_text()
    if not same:
        write_lock(path, now)
    if form == "json":
        _write_json(
            {
                "lock": str(path),
                "written": not same,
                "replaced": before is not None or unusable is not None,
                "changes": [drift.to_dict() for drift in changes],
                "distributions": [locked.to_dict() for _, locked in sorted(now.distributions.items())],
            }
        )
        return 0
    if unusable is not None:
        sys.stderr.write(f"warning: what stood there was not usable and is replaced: {unusable}\n")
    sys.stdout.write(_written(path, now, before, changes))
    return 0


def verify(argv: list[str]) -> int:
    """Compare with the lock, say what differs, and return 0 or 2.

    Raises:
        UserError: a wrong command line, or there is no usable lock.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_VERIFY_HELP)
        return 0
    form, rest = output_format(argv, ("table", "json"))
    name, rest = take_option(rest, "--lock-file")
    with_files = "--files" in rest
    _refuse_stray([word for word in rest if word != "--files"], "mm plugin verify")
    path = Path(name or NAME)
    locked, manager = read_lock(path), default_manager()
    now = current_lock(manager)
    _warn_of_unreadable(manager)
    drift = compare(locked, now) + (changed_files(manager) if with_files else ())
    if form == "json":
        _write_json({"lock": str(path), "ok": not drift, "drift": [found.to_dict() for found in drift]})
    elif drift:
        lines = "".join(f"  {found}\n" for found in drift)
        sys.stdout.write(f"{path}: what is installed differs\n{lines}")
        sys.stdout.write(f"Put it back, or accept what is installed: mm plugin lock --output {path}\n")
    else:
        _say_agreement(path, now, with_files)
    return 2 if drift else 0


def _warn_of_unreadable(manager: PluginManager) -> None:
    """Say on stderr which distributions cannot be locked or compared, because their metadata is damaged."""
    for said in manager.discover().diagnostics:
        if said.level == "error":
            sys.stderr.write(f"{said}\n")


def _older(path: Path) -> tuple[Lock | None, LockError | None]:
    """The lock that is to be replaced, or why it cannot be read."""
    if not os.path.exists(path):
        return None, None
    try:
        return read_lock(path), None
    except LockError as error:
        return None, error


def _written(path: Path, now: Lock, before: Lock | None, changes: Sequence[Drift]) -> str:
    count = _count(now)
    if before is not None and before.to_text() == now.to_text():
        return f"{path} is up to date: {count}\n"
    lines = [f"wrote {path}: {count}"]
    if before is None:
        lines += [
            f"  {locked.name} {locked.version} ({locked.origin})"
            for _, locked in sorted(now.distributions.items())
        ]
    elif changes:
        lines += [f"  {drift.message}" for drift in changes]
    else:
        lines.append("  only where distributions were installed from")
    return "\n".join(lines) + "\n"


def _say_agreement(path: Path, now: Lock, with_files: bool) -> None:
    sys.stdout.write(f"{path}: {_count(now)} as locked\n")
    if with_files:
        packages = [entry for entry in now.distributions.values() if entry.contents_of == "RECORD"]
        sys.stdout.write(
            f"  the files of {len(packages)} installed packages are those of their RECORD; of editable installs "
            "the source files are compared in any case\n"
        )
    unlocked = [
        entry.name for _, entry in sorted(now.distributions.items()) if entry.contents_of == "nothing"
    ]
    if unlocked:
        sys.stdout.write(
            f"  the contents of {', '.join(unlocked)} are not locked: no RECORD, and no package found\n"
        )


def _count(lock: Lock) -> str:
    return f"{len(lock.distributions)} distribution{'' if len(lock.distributions) == 1 else 's'}"


def _write_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _refuse_stray(words: Sequence[str], command: str) -> None:
    if words:
        text = f'unexpected argument "{words[0]}"'
        raise ConfigError(
            [Finding("error", "stray-argument", text, path=command, suggestion=f"See {command} --help")]
        )
