"""`mm check`: the files of a job, or single files, with every finding at once. Nothing is built and torch is
not imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable

from mm_core.cli.options import output_format
from mm_core.config.findings import ConfigError, Finding, has_errors

_HELP = """\
usage: mm check FILE... [--format text|json]
       mm check --mm-model FILE --mm-data FILE [FLAGS OF mm train] [--format text|json]

Check configuration files: syntax, keys, types, ids, and how the files of a job fit together. A single file
may be a training model, an inference, data, tools or sharding file; its keys tell which. Exit code 2 if
there is an error, else 0.
"""
_PLURALS = {"error": "errors", "warning": "warnings", "note": "notes"}


def run(argv: list[str]) -> int:
    """Check what the command line names, print the findings, and return 0, or 2 if an error is among them."""
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    # pydantic would read the metadata of every distribution for plugins of its own, which takes as long as
    # the check.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    form, rest = output_format(argv, ("text", "json"))
    findings = _findings(rest)
    if form == "json":
        data = {"findings": [finding.to_dict() for finding in findings]}
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(findings_text(findings))
    return ConfigError.exit_code if has_errors(findings) else 0


def _findings(arguments: list[str]) -> tuple[Finding, ...]:
    files = [word for word in arguments if not word.startswith("-")]
    if files and len(files) == len(arguments):
        from mm_core.config.file_check import check_file

        return tuple(finding for file in files for finding in check_file(file))
    from mm_core.config.flags import parse_train_flags
    from mm_core.config.job import check_training_job

    try:
        flags = parse_train_flags(arguments)
    except ConfigError as error:
        return error.findings
    return check_training_job(flags)


def findings_text(findings: Iterable[Finding]) -> str:
    """Return one line for each finding, and a last one that counts them."""
    findings = tuple(findings)
    lines = [str(finding) for finding in findings]
    counts = [
        f"{count} {level if count == 1 else plural}"
        for level, plural in _PLURALS.items()
        if (count := sum(finding.level == level for finding in findings))
    ]
    lines.append(", ".join(counts) if counts else "nothing to say: no errors, warnings or notes")
    return "\n".join(lines) + "\n"
