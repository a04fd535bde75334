"""`mm explain`: each value of a job, where it was written, and what hooks changed. Nothing is built and torch is
not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mm_core.cli import pydantic_plugins
from mm_core.cli.options import output_format
from mm_core.cli.tables import json_text, printable, table
from mm_core.config.findings import ConfigError, Finding, has_errors, show
from mm_core.config.overrides import is_override

if TYPE_CHECKING:
    from mm_core.config.explain import Explained

_HELP = """\
usage: mm explain [FIELD] --mm-model FILE [--mm-data FILE] [FLAGS OF mm train] [--format table|json]
       mm explain [FIELD] job.yaml [FLAGS OF mm train] [key.path=value...] [--format table|json]
       mm explain [FIELD] FILE... [--format table|json]

Print each value of a job with the place where it was written (file:line:column, flag, default, or hook with its
distribution), and below it every overwrite: old → new, by whom: why. FILEs are those of one training job, or one
inference file; the flags of `mm train` are fields too (flags.lr).

FIELD is a path (model.predictor.num_layers), the end of one (num_layers), or a section (predictor). As for
`mm check`, the job need not be complete. If there is an error in it, its findings are printed instead, as by
`mm check`, and the exit code is 2.
"""
_FILES = (".json", ".yaml", ".yml")


def run(argv: list[str]) -> int:
    """Print the values that the command line asks for, and return 0, or 2 with the findings of a job that has an
    error.

    Raises:
        ConfigError: the command line is wrong, or the job has no such field.
    """
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    pydantic_plugins.disable()
    form, rest = output_format(argv, ("table", "json"))
    field = rest.pop(0) if rest and _is_field(rest[0]) else None
    if not rest:
        text = "no file is named, so there is no job to explain"
        mend = "Add --mm-model FILE and the other flags of `mm train`, or the files alone"
        raise ConfigError([Finding("error", "missing-argument", text, path="mm explain", suggestion=mend)])
    try:
        explained = _explained(rest)
    except ConfigError as error:
        from mm_core.cli.check import findings_text

        found = {"findings": [finding.to_dict() for finding in error.findings]}
        sys.stdout.write(json_text(found) if form == "json" else findings_text(error.findings))
        return error.exit_code
    if field is not None:
        from mm_core.config.explain import matching

        try:
            explained = matching(field, explained)
        except ConfigError as error:
            if form != "json":
                raise
            sys.stdout.write(json_text({"findings": [finding.to_dict() for finding in error.findings]}))
            return error.exit_code
    if form == "json":
        sys.stdout.write(json_text([item.to_dict() for item in explained]))
    else:
        sys.stdout.write(printable(_text(explained)))
    return 0


def _is_field(word: str) -> bool:
    return not (word.startswith("-") or word.endswith(_FILES) or is_override(word))


def _explained(words: list[str]) -> tuple[Explained, ...]:
    from mm_core.config.explain import explain_files, explain_flags

    if not any(word.startswith("-") or is_override(word) for word in words):
        return explain_files(words)
    from mm_core.config.flag_parsing import read_command_line
    from mm_core.config.job import check_command_line

    flags, findings = read_command_line(words)
    if has_errors(findings):
        raise ConfigError(check_command_line(words))
    return explain_flags(flags)


def _text(explained: Sequence[Explained]) -> str:
    rows = table(
        ("field", "value", "origin"),
        ((item.field, show(item.value), str(item.origin)) for item in explained),
    ).splitlines(keepends=True)
    lines = [rows[0]]
    for item, row in zip(explained, rows[1:], strict=True):
        lines += [row, *(f"    {overwrite}\n" for overwrite in item.overwrites)]
    return "".join(lines)
