"""`mm plugin enable` and `mm plugin disable`: edit a selection file. Only names are compared, so they work for a
distribution whose metadata or code is broken; no plugin is imported.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from mm_core.cli.options import only_word, output_format, take_option
from mm_core.cli.selection_file import SelectionFile, locked
from mm_core.cli.tables import json_text
from mm_core.config.environment import variables
from mm_registry import PluginManager, UserError
from mm_registry.selection import (
    CORE_DISTRIBUTIONS,
    PROJECT_FILE,
    Selection,
    SelectionLayer,
    environment_file,
    find_project_file,
)
from mm_registry.spec import Status, canonical_name
from mm_registry.suggestions import closest

_HELP = """\
usage: mm plugin {command} DISTRIBUTION [--scope environment|project] [--format table|json]

{purpose}
The change is written to a selection file: the environment's (etc/mmzoo/plugins.toml below its prefix, the
default) or the project's (the nearest mmzoo.toml from the working directory upwards; a new one is made here).
Comments and order in the file stay as they are.
"""
_PURPOSE = {
    "enable": "Let a distribution take part that a selection file disables, or that the allow list there leaves out.",
    "disable": "Leave a distribution out without uninstalling it: its ids are refused, its hooks never run.",
}
_SCOPES = ("environment", "project")


@dataclass(frozen=True)
class Outcome:
    """What was done; docs/plugin-commands.md explains the fields.

    `takes_part` is what holds afterwards, all selections together; `detail` says why, if that is not what the
    command's name promises.
    """

    command: str
    distribution: str
    scope: str
    file: str
    created: bool
    changed: bool
    changes: tuple[str, ...]
    takes_part: bool
    detail: str


def enable(argv: list[str]) -> int:
    """Take a distribution out of `disable`, or put it into `enable` or `allow`; return 0."""
    return _run("enable", argv)


def disable(argv: list[str]) -> int:
    """Put a distribution into `disable`; return 0."""
    return _run("disable", argv)


def _run(command: str, argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP.format(command=command, purpose=_PURPOSE[command]))
        return 0
    form, rest = output_format(argv, ("table", "json"))
    scope, rest = take_option(rest, "--scope")
    name = canonical_name(only_word(rest, f"mm plugin {command}", "a distribution"))
    outcome = change(command, name, _scope(scope))
    sys.stdout.write(json_text(asdict(outcome)) if form == "json" else _text(outcome))
    return 0


def _scope(written: str | None) -> str:
    if written is None or written in _SCOPES:
        return written or _SCOPES[0]
    raise UserError(f'--scope: "{written}" is no scope; write {" or ".join(_SCOPES)}')


def change(command: str, name: str, scope: str) -> Outcome:
    """Edit the file of a scope so that the distribution is enabled or disabled there.

    Raises:
        UserError: it is MM Zoo itself, nothing installed or named in the file is called so, or the file cannot be
            read or written.
    """
    if command == "disable" and name in CORE_DISTRIBUTIONS:
        raise UserError(f"mm plugin disable: {name} is MM Zoo itself and cannot be disabled")
    place = (
        environment_file() if scope == "environment" else find_project_file() or os.path.abspath(PROJECT_FILE)
    )
    with locked(Path(place)):
        file, created = _edited(command, name, scope, place)
    takes_part, detail = _in_force(name)
    if takes_part == (command == "enable"):
        detail = ""
    return Outcome(
        command, name, scope, place, created, bool(file.changes), tuple(file.changes), takes_part, detail
    )


def _edited(command: str, name: str, scope: str, place: str) -> tuple[SelectionFile, bool]:
    """Edit the file, and return it and whether it is new."""
    file = SelectionFile.read(Path(place))
    if name not in CORE_DISTRIBUTIONS:
        _refuse_unknown(command, name, file.layer)
    if command == "disable":
        file.remove("enable", name)
        file.add("disable", name)
    elif name not in CORE_DISTRIBUTIONS:
        file.remove("disable", name)
        if file.layer.allow is not None:
            file.add("allow", name)
        outside = [SelectionFile.read(Path(environment_file())).layer] if scope == "project" else []
        if Selection(tuple(outside)).excludes(name) is not None and not _not_allowed(outside, name):
            file.add("enable", name)
    return file, file.write()


def _not_allowed(layers: list[SelectionLayer], name: str) -> bool:
    """Whether an outer allow list leaves it out, which no `enable` can pass."""
    excluded = Selection(tuple(layers)).excludes(name)
    return excluded is not None and excluded[0] is Status.NOT_ALLOWLISTED


def _in_force(name: str) -> tuple[bool, str]:
    """Whether a distribution takes part now, and which line says so or not, all selections together."""
    variable = SelectionLayer.from_environ(variables())
    project = find_project_file()
    places = [environment_file(), *([project] if project is not None else [])]
    layers = [variable] if variable is not None else []
    try:
        layers += [SelectionFile.read(Path(place)).layer for place in places]
    except UserError as error:
        return False, f"no command takes plugins until this is mended: {error}"
    selection = Selection(tuple(layers))
    excluded = selection.excludes(name)
    if excluded is not None:
        return False, excluded[1]
    return True, "; ".join(line for line in selection.about([name], "") if line.endswith(f" enables {name}"))


def _refuse_unknown(command: str, name: str, layer: SelectionLayer) -> None:
    """Raise if the name is neither that of a plugin, readable or not, nor in the file already."""
    if name in {*layer.disable, *layer.enable, *(layer.allow or ())}:
        return
    # Without selections: a mistake in one of them must not keep anyone from mending it with this command.
    manager = PluginManager(environ={}, environment_file=None, project_folder=None)
    plugins = {canonical_name(record.name) for record in manager.distributions()}
    plugins |= {
        canonical_name(said.distribution) for said in manager.discover().diagnostics if said.distribution
    }
    plugins -= CORE_DISTRIBUTIONS
    if name in plugins:
        return
    version = manager.version(name)
    what = (
        f"{name} {version} is no plugin"
        if version is not None
        else f"the distribution {name!r} is not installed"
    )
    # People leave the usual prefix out.
    near = closest(name, plugins, 1) or sorted(each for each in plugins if each.endswith(f"-{name}"))
    mend = f"did you mean {near[0]!r}?" if near else "`mm list` shows which distributions offer something"
    raise UserError(f"mm plugin {command}: {what}; {mend}")


def _text(outcome: Outcome) -> str:
    whose = f"the {outcome.scope}'s selection file {outcome.file}"
    if outcome.changes:
        done = f"{', '.join(outcome.changes)} in {whose}{', which is new' if outcome.created else ''}"
    else:
        done = f"nothing to change in {whose}"
    state = "takes part" if outcome.takes_part else "takes no part"
    expected = outcome.takes_part == (outcome.command == "enable")
    still = "" if expected else f", all the same: {outcome.detail}"
    return f"{done}\n{outcome.distribution} {state}{still}\n"
