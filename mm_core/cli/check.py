"""`mm check`: the files of a job, or single files, with every finding at once. Without `--build` nothing is built and
torch is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from mm_core.cli import pydantic_plugins
from mm_core.cli.options import choice, output_format
from mm_core.cli.tables import json_text
from mm_core.config.findings import ConfigError, Finding, has_errors

_HELP = """\
usage: mm check FILE... [--format text|json] [--level note|warning|error]
       mm check --mm-model FILE --mm-data FILE [FLAGS OF mm train] [key.path=value...]
       mm check job.yaml FLAG_OR_OVERRIDE...
       mm check ... --build

Check configuration files: syntax, keys, types, ids, and how the files of a job fit together. A single file
may be a training model, an inference, data, tools or sharding file, or a job file; its keys tell which. With flags
or overrides it is a job on this machine, whose paths must exist. Exit code 2 if there is an error, else 0.

--level warning leaves notes out of the text, --level error warnings too; the last line counts all.
--build imports torch, builds the models on the meta device, and checks the patterns of the sharding file against
them and the names and shapes of weights, of which it reads headers only. A line says what was built, and a table how
it is sharded: sizes are those of one rank of as many as the flags ask for.
"""
LEVELS = ("note", "warning", "error")
_PLURALS = {"error": "errors", "warning": "warnings", "note": "notes"}


def run(argv: list[str]) -> int:
    """Check what the command line names, print the findings, and return 0, or 2 if an error is among them."""
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    pydantic_plugins.disable()
    form, rest = output_format(argv, ("text", "json"))
    level, rest = choice(rest, "--level", LEVELS)
    build = "--build" in rest
    rest = [word for word in rest if word != "--build"]
    summary: list[str] = []
    tables, sharding = "", None
    try:
        findings = _findings(rest)
        if build:
            from mm_core.cli.check_build import check_build  # imports torch

            report = check_build(rest, findings)
            findings, summary = (*findings, *report.findings), report.summary
            tables, sharding = report.tables, report.sharding
    except ConfigError as error:
        if form != "json":
            raise
        findings = error.findings
    if form == "json":
        data: dict[str, Any] = {"findings": [finding.to_dict() for finding in findings]}
        if sharding is not None:
            data["sharding"] = sharding
        sys.stdout.write(json_text(data))
    else:
        lines = "".join(f"{line}\n" for line in summary)
        sys.stdout.write(lines + tables + findings_text(findings, level))
    return ConfigError.exit_code if has_errors(findings) else 0


def _findings(arguments: list[str]) -> tuple[Finding, ...]:
    from mm_core.config.overrides import is_override

    if not arguments:
        text = "no file is named, so there is nothing to check"
        mend = "Name the files, or see mm check --help"
        raise ConfigError([Finding("error", "missing-argument", text, path="mm check", suggestion=mend)])
    files = [word for word in arguments if not word.startswith("-") and not is_override(word)]
    if files and len(files) == len(arguments):
        from mm_core.config.file_check import check_file

        alone = tuple(finding for file in files for finding in check_file(file))
        if len(files) == 1:
            return alone
        from mm_core.config.together import check_files_together

        return (*alone, *check_files_together(files))
    from mm_core.config.job import check_command_line

    return check_command_line(arguments)


def findings_text(findings: Iterable[Finding], least: str = "note") -> str:
    """Return one line for each finding of a level, or a graver one, and a last line that counts all."""
    findings = tuple(findings)
    shown = LEVELS[LEVELS.index(least) :]
    lines = [str(finding) for finding in findings if finding.level in shown]
    counts = [
        f"{count} {level if count == 1 else plural}"
        for level, plural in _PLURALS.items()
        if (count := sum(finding.level == level for finding in findings))
    ]
    lines.append(", ".join(counts) if counts else "nothing to say: no errors, warnings or notes")
    return "\n".join(lines) + "\n"
