"""The list of checks for the documentation: `python -m mm_core.testing.catalogue docs/conformance.md` writes it there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mm_core.testing.check import STAGES, Check, Stage, load_checks

BEGIN = "<!-- checks: written by python -m mm_core.testing.catalogue -->"
END = "<!-- end of checks -->"
_STAGES: dict[Stage, str] = {
    "metadata": "From metadata, nothing imported",
    "light": "By importing",
    "build": "By building and running",
    "ranks": "On one and two ranks",
}


def catalogue() -> str:
    """Return the checks as Markdown, a table for each stage."""
    checks = load_checks().values()
    parts = [f"{len(checks)} checks.\n"]
    for stage in STAGES:
        rows = [
            f"| `{check.name}` | {_scope(check)} | {_said(check)} |"
            for check in checks
            if check.stage == stage
        ]
        parts.append(
            "\n".join(
                [f"### {_STAGES[stage]}\n", "| check | of | holds when it passes |", "|---|---|---|", *rows]
            )
            + "\n"
        )
    return "\n".join(parts)


def with_catalogue(page: str) -> str:
    """Return a page with what stands between its two marks replaced by the list."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, "the page has no mark for the beginning of the list"
    assert end, "the page has no mark for the end of the list"
    return f"{before}{BEGIN}\n\n{catalogue()}\n{END}{after}"


def _scope(check: Check) -> str:
    if check.whole_plugin:
        return "plugin"
    return "component" if check.roles is None else ", ".join(sorted(check.roles))


def _said(check: Check) -> str:
    title = check.title[0].upper() + check.title[1:]
    return f"{title}. {check.explanation}".replace("|", "\\|").rstrip()


def _main(file: Path) -> None:
    text = with_catalogue(file.read_text(encoding="utf-8"))
    temporary = file.with_name(f".tmp-{file.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
