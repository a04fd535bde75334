"""The difference between a foreign job and its job file: what is not as it was, by key, and a count of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mm_core.config.findings import Finding
from mm_core.config.migrate.plan import Change, Plan
from mm_core.config.migrate.yaml_text import one_line
from mm_core.config.origin import KeyPath

_COUNTED = {
    "legacy": ("legacy spelling rewritten", "legacy spellings rewritten"),
    "path": ("path rewritten", "paths rewritten"),
    "section": ("file became a section", "files became sections"),
    "added": ("value taken from the launcher", "values taken from the launcher"),
    "overruled": ("flag given more than once", "flags given more than once"),
    "dropped": ("name of an alias dropped", "names of aliases dropped"),
    "secret": ("secret left out", "secrets left out"),
}
_NOTED = {
    "no-effect": ("has no effect here", "have no effect here"),
    "not-available": ("is not available yet", "are not available yet"),
}


def difference(
    plan: Plan,
    sources: Sequence[str],
    name: str,
    written: Mapping[KeyPath, tuple[int, str]],
    place: Callable[[Change], str],
    findings: Mapping[KeyPath, Sequence[Finding]],
) -> str:
    """Return the changes like a unified diff, and a line that sums up.

    Args:
        name: the new file.
        written: path -> line and text (without its comment) in the new file.
        place: where the old value of a change stood, in short.
    """
    lines = [f"--- {', '.join(dict.fromkeys(sources)) or 'flags'}", f"+++ {name}"]
    for section in dict.fromkeys(_section(change) for change in plan.changes):
        count = len(plan.values.get(section, ()))
        lines.append(f"@@ {section}: {_plural(count, ('key', 'keys'))} @@" if count else f"@@ {section} @@")
        for change in plan.changes:
            if _section(change) == section:
                lines += _lines(change, name, written, place(change))
    return "\n".join([one_line(line) for line in [*lines, summary(plan, findings)]] + [""])


def _section(change: Change) -> str:
    if change.path:
        return str(change.path[0])
    return "not in the new file"


def _lines(change: Change, name: str, written: Mapping[KeyPath, tuple[int, str]], place: str) -> list[str]:
    line, text = written.get(change.path, (0, ""))
    new = f"{name}:{line}" if line else ""
    if change.kind == "section":
        text = f"{text} …"
    width = max(len(place), len(new))
    old = [f"-{place:<{width}}  {change.old}".rstrip()] if change.old else []
    return [*old, f"+{new:<{width}}  {text}"] if line else old


def summary(plan: Plan, findings: Mapping[KeyPath, Sequence[Finding]]) -> str:
    """Return one line that counts what was moved and what was changed."""
    parts = [f"{_plural(plan.moved(), ('value', 'values'))} as they were"]
    for kind, words in _COUNTED.items():
        count = sum(change.kind == kind for change in plan.changes)
        if count:
            parts.append(_plural(count, words))
    for code, words in _NOTED.items():
        count = sum(any(finding.code == code for finding in found) for found in findings.values())
        if count:
            parts.append(_plural(count, words))
    return ", ".join(parts)


def _plural(count: int, words: tuple[str, str]) -> str:
    return f"{count} {words[0] if count == 1 else words[1]}"
