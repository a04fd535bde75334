"""docs/plugin-commands.md is true: its commands are all there, its examples run, its fields are those of the output."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mm_core.cli.plugin import COMMANDS
from tests.e2e.conftest import ROOT, run_mm
from tests.e2e.plugin_site import Site, full_site

PAGE = ROOT / "docs" / "plugin-commands.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return full_site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("project"))


@pytest.fixture
def site(installed: Site) -> Iterator[Site]:
    yield installed
    installed.clean()


@dataclass(frozen=True)
class Section:
    """One command's section: its example lines, the JSON fields of its tables, its exit codes."""

    commands: tuple[str, ...]
    fields: frozenset[str]
    exits: str


def sections() -> dict[str, Section]:
    found = {}
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        lines = [
            line
            for block in re.findall(r"^```bash\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
            for line in block.splitlines()
        ]
        table = re.search(r"^\| field \|.*?\n\|[-|]+\n((?:\|.*\n)+)", body, re.MULTILINE)
        rows = table[1].splitlines() if table else []
        fields = {field for row in rows for field in re.findall(r"`([^`]+)`", row.split("|")[1])}
        exits = re.search(r"^Exit codes: (.*)$", body, re.MULTILINE)
        found[name] = Section(tuple(lines), frozenset(fields), exits[1] if exits else "")
    return found


SECTIONS = sections()


def paths(value: Any, documented: frozenset[str], path: str = "") -> Iterator[str]:
    """Yield the path of each leaf; an object whose keys are data, or null, is one if the page says so."""
    if path and f"{path}{{}}" in documented:
        yield f"{path}{{}}"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, documented, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        if not value and f"{path}[]" in documented:
            yield f"{path}[]"
        for inner in value:
            yield from paths(inner, documented, f"{path}[]")
    else:
        yield path


def rich_project(site: Site) -> None:
    """Selections, so that no list in the outputs is empty."""
    (site.project / "mmzoo.toml").write_text(
        '[plugins]\ndisable = ["mmzoo-plugin-future"]\nenable = ["mmzoo-plugin-bare"]\n'
        '[plugins.prefer]\n"ae/shared" = "mmzoo-plugin-rival"\n',
        encoding="utf-8",
    )


def explained(site: Site) -> list[Any]:
    rich_project(site)
    return [site.json("plugin", "explain", id) for id in ("shared", "acme_old", "acme_big", "acme_dot")]


def locked(site: Site, command: str) -> list[Any]:
    before = site.json("plugin", "lock")
    rich_project(site)  # it selects, and so changes what ids mean
    verified = site.json("plugin", "verify")
    again = site.json("plugin", "lock")
    return [before, again] if command == "lock" else [verified]


def selected(site: Site) -> list[Any]:
    rich_project(site)
    return [
        site.json("plugin", command, "mmzoo-plugin-acme", "--scope", "project")
        for command in ("disable", "enable")
    ]


def new(site: Site) -> list[Any]:
    made = site.json("plugin", "new", "documented")
    shutil.rmtree(site.project / made["folder"])
    return [made]


def told(site: Site) -> list[Any]:
    rich_project(site)
    return [site.json("doctor")]


OUTPUTS: dict[str, Callable[[Site], list[Any]]] = {
    "mm list": lambda site: [site.json("list", "--group", "all")],
    "mm show": lambda site: [site.json("show", id) for id in ("acme_dit", "acme_big")],
    "mm doctor": told,
    "mm plugin explain": explained,
    "mm plugin check": lambda site: [
        site.json("plugin", "check", "mmzoo-plugin-haar", "--import", "--only", "target-exists")
    ],
    "mm plugin enable, mm plugin disable": selected,
    "mm plugin lock": lambda site: locked(site, "lock"),
    "mm plugin verify": lambda site: locked(site, "verify"),
    "mm plugin new": new,
}


def test_the_page_has_every_command() -> None:
    named = {name for heading in SECTIONS for name in heading.split(", ")}
    assert named == {"mm list", "mm show", "mm doctor", *(f"mm plugin {command}" for command in COMMANDS)}
    assert set(OUTPUTS) == set(SECTIONS)
    for heading, section in SECTIONS.items():
        assert section.exits.startswith("0"), heading
        assert any(line.startswith(heading.split(", ")[0]) for line in section.commands), heading
        assert section.fields, heading


@pytest.mark.parametrize("heading", OUTPUTS)
def test_the_fields_of_the_page_are_those_of_the_output(site: Site, heading: str) -> None:
    documented = SECTIONS[heading].fields
    real = {path for output in OUTPUTS[heading](site) for path in paths(output, documented)}
    assert real == documented


def test_the_examples_of_the_page_run(tmp_path: Path) -> None:
    lines = [line for section in SECTIONS.values() for line in section.commands if " check " not in line]
    assert len(lines) >= len(SECTIONS)
    for line in lines:
        program, *arguments = line.split()
        assert program == "mm"
        result = run_mm(*arguments, cwd=tmp_path)
        assert result.code == 0, f"{line}\n{result.err}"
        if "--format json" in line:
            json.loads(result.out)
    assert (tmp_path / "mmzoo-plugin-my-codec" / "pyproject.toml").exists()
