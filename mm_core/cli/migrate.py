"""`mm migrate`: a foreign job as one commented job file."""

from __future__ import annotations

import os
import sys

from mm_core.cli import pydantic_plugins
from mm_core.cli.options import take_option
from mm_core.cli.tables import printable

_HELP = """\
usage: mm migrate SOURCE... [NAME=VALUE...] [FLAGS OF mm train] [--output FILE] [--dry-run] [--no-inline]

Rewrite a job of MindSpeed-MM as one commented job file. Nothing is run, and nothing is overwritten.

SOURCE is a launch script (its variables are read, not run; NAME=VALUE gives one that cannot be known), a
combined YAML, or model, data, tools and sharding files; their keys tell which. Flags win over a script's.

  --output FILE   the new file; default: job.yaml
  --dry-run       print the file instead of writing it
  --no-inline     let model, data, tools and sharding stay files of their own, which the new file names

What is not as it was is shown as a difference, and the new file is checked: exit code 2 if it has an error.
"""
_OUTPUT = "job.yaml"


def run(argv: list[str]) -> int:
    """Write the job file, print what changed and what the check says; return 0, or 2 if the check finds an error."""
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    pydantic_plugins.disable()
    from mm_core.cli.check import findings_text
    from mm_core.config.document import expanded
    from mm_core.config.file_check import check_file
    from mm_core.config.findings import ConfigError, Finding, has_errors
    from mm_core.config.migrate import migrate
    from mm_core.config.migrate.migration import existing

    output, rest = take_option(argv, "--output")
    output = _OUTPUT if output is None else output
    dry, inline = "--dry-run" in rest, "--no-inline" not in rest
    rest = [word for word in rest if word not in ("--dry-run", "--inline", "--no-inline")]
    if os.path.splitext(output)[1].lower() not in (".yaml", ".yml"):
        text = f'"{output}" is no name of a YAML file'
        raise ConfigError(
            [Finding("error", "wrong-value", text, path="--output", suggestion="End it in .yaml")]
        )
    if not dry and os.path.lexists(expanded(output)):
        raise existing(output)
    migration = migrate(rest, output=output, inline=inline)
    if dry:
        sys.stdout.write(migration.text + "\n")
    else:
        migration.write()
    sys.stdout.write(migration.difference)
    if migration.findings:
        sys.stdout.write("\nAbout the sources:\n" + findings_text(migration.findings))
    findings = migration.check() if dry else check_file(output)
    name = printable(output)
    sys.stdout.write(
        f"\nThe check of {name}{' (not written)' if dry else ''} says:\n" + findings_text(findings)
    )
    if not has_errors(findings):
        return 0
    if not dry:
        sys.stdout.write(f"{name} is written; mend what the check calls an error\n")
    return ConfigError.exit_code
