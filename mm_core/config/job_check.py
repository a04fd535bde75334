"""Checking a job file by itself: what is wrong with it anywhere, before it is known where it is to run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mm_core.config import cross_checks as cross
from mm_core.config.document import Document
from mm_core.config.file_check import check_document
from mm_core.config.findings import ConfigError, Finding, sort_findings
from mm_core.config.flag_parsing import read_command_line
from mm_core.config.job_file import from_document, missing_file, read_section
from mm_core.config.kinds import Kind, detect_kind
from mm_core.config.together import check_sections_together
from mm_registry import PluginManager

_KINDS = {"model": Kind.MODEL, "data": Kind.DATA, "tools": Kind.TOOLS, "fsdp2": Kind.FSDP2}


def check_job_document(document: Document, manager: PluginManager) -> tuple[Finding, ...]:
    """Return the findings of a job file: its flags, its sections, and the files that it names as far as they are there.
    Paths that do not exist are notes: the file may be for elsewhere.
    """
    flags, findings = read_command_line((), from_document(document))
    findings += _as_notes(cross.check_load(flags))
    found: dict[str, Document] = {}
    for section, kind in _KINDS.items():
        missing = missing_file(flags, section)
        if missing is not None:
            findings += _as_notes([missing])
            continue
        try:
            content, wrong = read_section(flags, section, kind)
        except ConfigError as error:
            findings += error.findings
            continue
        findings += wrong
        if content is None:
            continue
        found[section] = content
        label = section if section in flags.sections else content.path
        # A transformers model stands where a diffusion model does.
        actual = detect_kind(content) if section == "model" else kind
        actual = actual if actual is Kind.TRANSFORMERS else kind
        findings += check_document(content, actual, manager, label=label, load=flags.load)
    if "model" in found and "data" in found:
        findings += check_sections_together(found["model"], found["data"], manager)
    return sort_findings(findings, (document.path,))


def _as_notes(findings: Iterable[Finding]) -> list[Finding]:
    return [replace(finding, level="note") for finding in findings]
