"""From the words of `mm migrate` to the text of a job file, its difference to the sources, and what a check says."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mm_core.config.document import expanded
from mm_core.config.findings import ConfigError, Finding, sort_findings
from mm_core.config.job_check import check_job_document
from mm_core.config.migrate.changes import difference
from mm_core.config.migrate.comments import Comments, head
from mm_core.config.migrate.plan import Change, Plan, make_plan
from mm_core.config.migrate.sources import ForeignJob, read_sources
from mm_core.config.migrate.yaml_text import YamlText
from mm_core.config.origin import KeyPath
from mm_core.config.yaml_reader import parse_yaml
from mm_registry import default_manager

#: The check tells the new spelling of a key in these words; a test reads it from every class.
_NEW_SPELLING = re.compile(r'is an old spelling of "(\w+)"')
#: A key that is renamed may turn up others; more rounds than this would be a loop.
_ROUNDS = 5


@dataclass(frozen=True)
class Migration:
    """A job file that is not written yet.

    Attributes:
        output: its path, as the user named it.
        text: its content.
        difference: what changed, for people.
        findings: about the sources: what was not followed, what is left out.
    """

    output: str
    text: str
    difference: str
    findings: tuple[Finding, ...]

    def check(self) -> tuple[Finding, ...]:
        """Return what the check of the new file says, as if it were written."""
        return check_text(self.text, self.output)

    def write(self) -> None:
        """Write the file whole or not at all.

        Raises:
            ConfigError: something of that name exists, or it cannot be written.
        """
        target = expanded(self.output)
        temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
        try:
            stream = temporary.open("x", encoding="utf-8")
            try:
                with stream:
                    stream.write(self.text)
                os.link(temporary, target)  # unlike a rename, it fails if there is a file of that name
            finally:
                temporary.unlink()
        except FileExistsError:
            raise existing(self.output) from None
        except OSError as error:
            text = f"it cannot be written: {error.strerror or error}"
            raise ConfigError([Finding("error", "not-written", text, self.output)]) from error


def existing(output: str) -> ConfigError:
    """Return the error for a file that must not be overwritten."""
    mend = "Name another with --output, or see what it would be with --dry-run"
    return ConfigError(
        [Finding("error", "exists", "it exists, and is not overwritten", output, suggestion=mend)]
    )


def migrate(argv: Sequence[str], *, output: str = "job.yaml", inline: bool = True) -> Migration:
    """Read a foreign job and return it as a job file. Nothing is written or run.

    Args:
        argv: a launch script, configuration files, `NAME=value` for the script's variables, flags of `mm train`.
        inline: whether files become sections of the job file, or stay files that it names.

    Raises:
        ConfigError: with everything that keeps the job from being read.
    """
    folder = os.path.dirname(expanded(output))
    if not os.path.isdir(folder or "."):
        raise ConfigError([Finding("error", "missing-folder", f"there is no folder {folder}", output)])
    job = read_sources(argv, inline=inline)
    plan = make_plan(job, folder)
    found: dict[KeyPath, list[Finding]] = {}
    for _ in range(_ROUNDS):
        _, text = _render(job, plan, output, {})
        found = _by_path(text, job, plan, output)
        renamed = _new_spellings(found)
        if not renamed:
            break
        for path, new in renamed.items():
            plan.rename(path, new)
    comments, text = _render(job, plan, output, found)
    findings = [*job.findings, *(_left_out(path, origin.file) for path, origin in plan.secrets.items())]
    return Migration(
        output,
        _whole(job, plan, output, text),
        difference(
            plan, job.sources, os.path.basename(output), _written(job, plan, output, text),
            lambda change: _place(change, comments), found,
        ),
        sort_findings(findings),
    )  # fmt: skip


def check_text(text: str, path: str) -> tuple[Finding, ...]:
    """Return the findings of a job file that need not be on the disk."""
    return check_job_document(parse_yaml(text, path), default_manager())


def _render(
    job: ForeignJob, plan: Plan, output: str, found: dict[KeyPath, list[Finding]]
) -> tuple[Comments, YamlText]:
    comments = Comments(job, plan, found)
    return comments, YamlText(plan.values, comments.behind, comments.above)


def _whole(job: ForeignJob, plan: Plan, output: str, text: YamlText) -> str:
    return "\n".join([*head(job, plan, output), "", *text.lines, ""])


def _offset(job: ForeignJob, plan: Plan, output: str) -> int:
    """Return the lines above the first one of the values."""
    return len(head(job, plan, output)) + 1


def _by_path(text: YamlText, job: ForeignJob, plan: Plan, output: str) -> dict[KeyPath, list[Finding]]:
    """Check the file and return the findings by the place in it."""
    offset = _offset(job, plan, output)
    found: dict[KeyPath, list[Finding]] = {}
    for finding in check_text(_whole(job, plan, output, text), output):
        path = text.places.get((finding.line or 0) - offset)
        if path is not None and finding.file == output:
            found.setdefault(path, []).append(finding)
    return found


def _new_spellings(found: dict[KeyPath, list[Finding]]) -> dict[KeyPath, str]:
    renamed = {}
    for path, findings in found.items():
        for finding in findings:
            match = _NEW_SPELLING.search(finding.message) if finding.code == "legacy-key" else None
            if match is not None:
                renamed[path] = match[1]
    return renamed


def _written(job: ForeignJob, plan: Plan, output: str, text: YamlText) -> dict[KeyPath, tuple[int, str]]:
    """Return path -> line of the new file and what stands there, without its comment."""
    offset = _offset(job, plan, output)
    bare = YamlText(plan.values, lambda path: "")
    lines = {path: bare.lines[line - 1].strip() for line, path in bare.places.items()}
    return {path: (line + offset, lines[path]) for line, path in text.places.items()}


def _place(change: Change, comments: Comments) -> str:
    return comments.place(change.place)


def _left_out(path: KeyPath, file: str | None) -> Finding:
    name = ".".join(map(str, path))
    text = f"{name} is a secret, and is left out"
    return Finding("warning", "secret", text, file, path=name, suggestion="Give it where training starts")
