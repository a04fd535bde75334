"""`mm plugin explain ID`: why an id means what it means. Reads metadata only: imports neither torch nor a
plugin.
"""

from __future__ import annotations

import sys
from typing import Any

from mm_core.cli.ids import groups_named, unknown_everywhere
from mm_core.cli.options import only_word, output_format, take_option
from mm_core.cli.tables import json_text, named_values, printable
from mm_registry import GROUPS, default_manager

_HELP = """\
usage: mm plugin explain ID [--group GROUP] [--format table|json]

Tell why an id means what it means: every distribution that claims it, what became of each claim, the lines of
selection that mattered, and the outcome. Nothing is imported, and an id that nobody offers is an outcome too.
--group takes a role (predictor, ae, …) or an entry-point group; without it, every kind of component is searched.
"""


def run(argv: list[str]) -> int:
    """Print how an id was decided, in each group that knows it, and return 0."""
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    form, rest = output_format(argv, ("table", "json"))
    name, rest = take_option(rest, "--group")
    id = only_word(rest, "mm plugin explain", "an id")
    groups = groups_named(name)
    manager = default_manager()
    told = [manager.explain(group.name, id).to_dict() for group in groups if manager.offers(group.name, id)]
    if not told and len(groups) == 1:
        told = [manager.explain(groups[0].name, id).to_dict()]
    elif not told:
        told = [_nowhere(id, str(unknown_everywhere(manager, id, groups)))]
    sys.stdout.write(json_text(told) if form == "json" else printable("\n".join(map(_text, told))))
    return 0


def _nowhere(id: str, outcome: str) -> dict[str, Any]:
    """What is told of an id that no kind of component has; no group can be named."""
    return {
        "group": None, "id": id, "alias_of": None, "claims": [], "selection": [], "chosen": None, "outcome": outcome,
    }  # fmt: skip


def _text(told: dict[str, Any]) -> str:
    group = GROUPS[told["group"]] if told["group"] else None
    heading = f"{told['id']}: {group.noun}, chosen by {group.chosen_by}" if group else told["id"]
    lines: list[tuple[str, str]] = [
        ("claimed by", f"{claim['distribution']} {claim['version']}".rstrip() + f": {claim['verdict']}")
        for claim in told["claims"]
    ] or [("claimed by", "nobody")]
    lines += [("selection", line) for line in told["selection"]] or [("selection", "says nothing about it")]
    if told["alias_of"]:
        lines.append(("old id of", told["alias_of"]))
    lines.append(("outcome", told["outcome"]))
    shown: list[tuple[str, str]] = []
    for name, text in lines:
        shown.append(("" if shown and name in [earlier for earlier, _ in shown] else name, text))
    return f"{heading}\n{named_values(shown)}"
