"""`mm doctor`: what is wrong with this environment, its variables and its plugins, what it costs, and what mends it.
Reads metadata and source files only: imports neither torch nor a plugin (where torch_npu is installed, a process of
its own tries it).
"""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mm_core.cli.devices import describe_devices, devices_text
from mm_core.cli.diagnosis import LEVELS, Problem, diagnose, problem, requirements_of_core
from mm_core.cli.options import no_words, output_format
from mm_core.cli.tables import json_text, printable, table
from mm_core.config.environment import check_environment, is_read, set_variables, variables
from mm_core.megatron.installed import describe
from mm_registry import PluginManager, default_manager
from mm_registry.errors import SelectionError
from mm_registry.selection import VARIABLE, SelectionLayer, environment_file, find_project_file
from mm_registry.selection_files import read_layer
from mm_registry.spec import canonical_name

_HELP = """\
usage: mm doctor [--format table|json]

Tell what is wrong, or left unsaid, in this environment: damaged metadata, ids that two distributions claim,
plugins made for another version, missing requirements, devices that cannot be used, selection files in force,
environment variables that are set (who reads them, and whether their value is right); and what mends each.
Exit code 2 if there is an error, else 0.
"""


def run(argv: list[str]) -> int:
    """Print the findings; return 2 if there is an error, else 0."""
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    form, rest = output_format(argv, ("table", "json"))
    no_words(rest, "mm doctor")
    selection, damaged = _selection()
    # A selection that cannot be read must not hide everything else.
    manager = PluginManager(environment_file=None, project_folder=None) if damaged else default_manager()
    environment = list(_environment())
    devices, unusable = describe_devices()
    problems = _worst_first([*damaged, *unusable, *diagnose(manager), *_wrong_variables()])
    failed = any(found.level == "error" for found in problems)
    page = {
        "ok": not failed,
        "python": {"version": platform.python_version(), "executable": sys.executable, "prefix": sys.prefix},
        "versions": list(_versions(manager)),
        "devices": devices,
        "optional": [dict(zip(("name", "version", "meaning"), row, strict=True)) for row in describe()],
        "plugins": list(_plugins(manager)),
        "selection": selection,
        "environment": environment,
        "problems": [found.to_dict() for found in problems],
    }
    sys.stdout.write(json_text(page) if form == "json" else printable(_text(page)))
    return 2 if failed else 0


def _versions(manager: PluginManager) -> Iterator[dict[str, str | None]]:
    """MM Zoo's own distributions, then what they require, as installed."""
    for name, wanted in requirements_of_core(manager).items():
        yield {"distribution": name, "version": manager.version(name), "required": wanted}


def _plugins(manager: PluginManager) -> Iterator[dict[str, Any]]:
    """Each distribution with entries of ours, and how many of them are in which status."""
    statuses: dict[str, Counter[str]] = {}
    for spec in manager.discover().entries:
        statuses.setdefault(canonical_name(spec.distribution), Counter())[str(spec.status)] += 1
    for record in manager.distributions():
        yield {
            "distribution": record.name,
            "version": record.version,
            "origin": record.origin,
            "path": record.path,
            "statuses": dict(sorted(statuses.get(canonical_name(record.name), Counter()).items())),
        }


def _environment() -> Iterator[dict[str, Any]]:
    """Each variable of our table that is set; secrets are hidden."""
    wrong = {finding.path: finding for finding in check_environment()}
    for variable, value in set_variables():
        found = wrong.get(variable.name)
        yield {
            "variable": variable.name,
            "value": variable.shown(value),
            "read_by": variable.reader,
            "effective": is_read(variable),
            "meaning": variable.meaning,
            "problem": found.text if found is not None and variable.reader else "",
        }


def _wrong_variables() -> Iterator[Problem]:
    for finding in check_environment():
        if finding.level != "note":
            found = problem(finding.level, "environment-variable", "", f"{finding.path}: {finding.message}")
            yield replace(found, mend=finding.suggestion)


def _worst_first(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda found: LEVELS.index(found.level))


def _selection() -> tuple[list[dict[str, Any]], list[Problem]]:
    """What each place says about which plugins take part, outermost first, and what cannot be read."""
    said = SelectionLayer.from_environ(variables())
    layers = [
        {"scope": "variable", "place": VARIABLE, "exists": said is not None, "readable": True, **_lists(said)}
    ]
    problems: list[Problem] = []
    for scope, path in (("environment", environment_file()), ("project", find_project_file())):
        layer: SelectionLayer | None = None
        exists = path is not None and os.path.exists(path)
        if path is not None and exists:
            try:
                layer = read_layer(path)
            except SelectionError as error:
                problems.append(problem("error", "unreadable-selection", "", str(error), path))
        readable = layer is not None or not exists
        layers.append(
            {"scope": scope, "place": path or "", "exists": exists, "readable": readable, **_lists(layer)}
        )
    return layers, problems


def _lists(layer: SelectionLayer | None) -> dict[str, Any]:
    layer = layer or SelectionLayer("")
    return {
        "allow": None if layer.allow is None else sorted(layer.allow),
        "disable": sorted(layer.disable),
        "enable": sorted(layer.enable),
        "prefer": dict(sorted(layer.prefer.items())),
    }


def _text(page: dict[str, Any]) -> str:
    python = page["python"]
    versions = ", ".join(
        f"{each['distribution']} {each['version'] or 'missing'}" for each in page["versions"]
    )
    parts = [
        f"Python {python['version']} ({python['executable']})\n{versions}\n{_optional(page['optional'])}\n"
        f"{devices_text(page['devices'])}",
        table(
            ("distribution", "version", "entries", "origin"),
            [
                (each["distribution"], each["version"], _counted(each["statuses"]), each["origin"])
                for each in page["plugins"]
            ],
        ),
        "".join(f"selection: {line}\n" for layer in page["selection"] for line in _layer_lines(layer))
        or "selection: nothing is selected; every installed plugin takes part\n",
        _environment_text(page["environment"]),
        _problems_text(page["problems"]),
    ]
    return "\n".join(parts)


def _optional(rows: Sequence[dict[str, Any]]) -> str:
    here = [f"{row['name']} {row['version']}" for row in rows if row["version"]]
    absent = [row["name"] for row in rows if not row["version"]]
    parts = [", ".join(here), f"not installed: {', '.join(absent)}" if absent else ""]
    return f"optional: {'; '.join(filter(None, parts))}"


def _environment_text(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "environment variables: none is set that matters here\n"
    header = ("environment variable", "value", "read by", "meaning")
    return table(header, [(each["variable"], each["value"], _reader(each), _meaning(each)) for each in rows])


def _reader(row: dict[str, Any]) -> str:
    if not row["read_by"]:
        return "nobody here"
    return str(row["read_by"]) if row["effective"] else f"{row['read_by']}, not installed"


def _meaning(row: dict[str, Any]) -> str:
    return f"{row['meaning']} ({row['problem']})" if row["problem"] else str(row["meaning"])


def _counted(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in statuses.items())


def _layer_lines(layer: dict[str, Any]) -> Iterator[str]:
    if not layer["readable"]:
        yield f"{layer['place']}: cannot be read"
    if not layer["exists"] or not layer["readable"]:
        return
    said = [
        f"{key} {', '.join(layer[key]) or 'nothing'}"
        for key in ("allow", "disable", "enable")
        if _given(layer[key], key)
    ]
    said += [f"prefer {name} for {key}" for key, name in layer["prefer"].items()]
    yield f"{layer['place']}: {'; '.join(said) or 'nothing'}"


def _given(names: Sequence[str] | None, key: str) -> bool:
    return names is not None if key == "allow" else bool(names)


def _problems_text(problems: Sequence[dict[str, Any]]) -> str:
    if not problems:
        return "nothing to mend\n"
    lines: list[str] = []
    for found in problems:
        lines.append(f"{found['level']}: {found['message']}\n")
        lines += [f"    {found[key]}\n" for key in ("why", "mend") if found[key]]
    counts = Counter(found["level"] for found in problems)
    total = ", ".join(f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items())
    return "".join(lines) + f"{total}\n"
