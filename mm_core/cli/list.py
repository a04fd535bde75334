"""`mm list`: every id that installed distributions offer. Reads metadata only: imports neither torch nor a
plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from mm_core.cli.ids import groups_named
from mm_core.cli.options import no_words, output_format, take_option
from mm_core.cli.tables import json_text, printable, table
from mm_registry import GROUPS, EntrySpec, Status, default_manager

_HELP = """\
usage: mm list [--group GROUP] [--format table|json]

List the ids that installed packages offer: components by default; --group takes a role (predictor, ae, …),
an entry-point group (mm_core.configs) or `all`.
"""
_COLUMNS = ("id", "group", "distribution", "version", "origin", "status")


def run(argv: list[str]) -> int:
    """Print the entries and return 0. What is wrong with installed distributions goes to stderr."""
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    form, rest = output_format(argv, ("table", "json"))
    group, rest = take_option(rest, "--group")
    no_words(rest, "mm list")
    groups = [each.name for each in groups_named(group, all_too=True)]
    report = default_manager().discover()
    order = list(GROUPS)
    entries = sorted(
        (entry for entry in report.entries if entry.group in groups),
        key=lambda entry: (order.index(entry.group), entry.id, entry.distribution),
    )
    shown = json_text([_object(entry) for entry in entries]) if form == "json" else printable(_table(entries))
    sys.stdout.write(shown)
    for diagnostic in report.diagnostics:
        sys.stderr.write(printable(f"{diagnostic}\n"))
    return 0


def _object(entry: EntrySpec) -> dict[str, str]:
    return {
        "id": entry.id,
        "group": entry.group,
        "distribution": entry.distribution,
        "version": entry.version,
        "origin": entry.origin,
        "status": str(entry.status),
        "target": entry.target,
        "path": entry.path,
        "detail": entry.detail,
    }


def _table(entries: Iterable[EntrySpec]) -> str:
    objects = [_object(entry) for entry in entries]
    if not objects:
        return "no installed distribution offers any\n"
    details = "".join(
        f"{row['distribution']}/{row['id']}: {row['detail']}\n"
        for row in objects
        if row["status"] != Status.AVAILABLE and row["detail"]
    )
    return table(_COLUMNS, ([row[name] for name in _COLUMNS] for row in objects)) + details
