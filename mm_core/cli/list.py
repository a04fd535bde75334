"""`mm list`: every id that installed distributions offer. Reads metadata only: imports neither torch nor a
plugin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence

from mm_core.cli.options import output_format, take_option
from mm_core.config.findings import ConfigError, Finding, did_you_mean
from mm_registry import GROUPS, ROLES, EntrySpec, Status, default_manager

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
    if rest:
        text = f'unexpected argument "{rest[0]}"'
        raise ConfigError(
            [Finding("error", "stray-argument", text, path="mm list", suggestion="See mm list --help")]
        )
    groups = _groups(group)
    report = default_manager().discover()
    order = list(GROUPS)
    entries = sorted(
        (entry for entry in report.entries if entry.group in groups),
        key=lambda entry: (order.index(entry.group), entry.id, entry.distribution),
    )
    if form == "json":
        sys.stdout.write(
            json.dumps([_object(entry) for entry in entries], indent=2, ensure_ascii=False) + "\n"
        )
    else:
        sys.stdout.write(_table(entries))
    for diagnostic in report.diagnostics:
        sys.stderr.write(f"{diagnostic}\n")
    return 0


def _groups(name: str | None) -> Sequence[str]:
    if name is None:
        return [group.name for group in ROLES.values()]
    if name == "all":
        return list(GROUPS)
    for group in GROUPS.values():
        if name in (group.name, group.name.partition(".")[2], group.role, group.mapping):
            return [group.name]
    names = [*(group.role for group in GROUPS.values()), *GROUPS, "all"]
    text = f'there is no group "{name}"'
    mend = did_you_mean(name, names, what="group")
    raise ConfigError([Finding("error", "unknown-group", text, path="--group", suggestion=mend)])


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
    rows = [[name.upper() for name in _COLUMNS], *([row[name] for name in _COLUMNS] for row in objects)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    for row in objects:
        if row["status"] != Status.AVAILABLE and row["detail"]:
            lines.append(f"{row['distribution']}/{row['id']}: {row['detail']}")
    return "\n".join(lines) + "\n"
