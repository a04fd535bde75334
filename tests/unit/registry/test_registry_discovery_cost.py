"""What discovery costs, counted without a clock: files opened, folders listed, modules imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mm_registry
from mm_registry.discovery import read_installed

GROUP = "mm_core.predictor_models"
PATH = [str(Path(mm_registry.__file__).parents[1]), *sys.path]

# An audit hook cannot be taken back, so it gets a process of its own.
PROBE = """
import json, os, sys
root, events = sys.argv[1], []

def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(root):
        events.append((event, os.path.relpath(arguments[0], root)))

sys.addaudithook(hook)
import mm_registry
ids = [spec.id for spec in mm_registry.PluginManager([root, root + "/."], environ={}).discover().entries]
json.dump({"ids": ids, "events": events, "modules": sorted(sys.modules)}, sys.stdout)
"""

SLOW_TO_IMPORT = {
    "email",
    "http",
    "ssl",
    "urllib",
    "zipfile",
    "packaging",
    "importlib_metadata",
    "pluggy",
    "tomllib",
}


def probe(root: Path) -> dict[str, Any]:
    # Without `site`: it may import anything for the editable installs of a developer's environment.
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {PATH!r}\n{PROBE}", str(root)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def test_a_stranger_costs_one_read_and_a_plugin_three(site: Any) -> None:
    for number in range(20):
        site.add(
            f"stranger-{number}",
            entries={"console_scripts": {"run": "stranger:main"}} if number % 2 else None,
        )
    site.add("mmzoo-core", "0.1.5")
    site.add(
        "acme", entries={GROUP: {"a": "acme:A"}}, requires=["mmzoo-core>=0.1,<0.2", "numpy; extra == 'x'"]
    )
    answer = probe(site.root)
    assert answer["ids"] == ["a"]
    listed = [event for event in answer["events"] if event[0] != "open"]
    assert listed == [["os.listdir", "."]]
    opened = [name for event, name in answer["events"] if event == "open"]
    strangers = sorted(f"stranger_{number}-1.0.dist-info/entry_points.txt" for number in range(20))
    assert sorted(name for name in opened if name.startswith("stranger")) == strangers
    assert sorted(name.partition("/")[2] for name in opened if name.startswith("acme")) == [
        "METADATA",
        "direct_url.json",
        "entry_points.txt",
    ]
    assert sorted(name.partition("/")[2] for name in opened if name.startswith("mmzoo")) == [
        "METADATA",
        "entry_points.txt",
        "requires.txt",
    ]


def test_plainly_written_plugins_need_no_slow_module(site: Any) -> None:
    site.add("mmzoo-core", "0.1.5")
    site.add(
        "acme",
        entries={GROUP: {"a": "acme:A"}},
        requires=["mmzoo-core>=0.1,<0.2"],
        direct_url={"url": f"file://{site.root}", "dir_info": {"editable": True}},
    )
    answer = probe(site.root)
    assert answer["ids"] == ["a"]
    assert not SLOW_TO_IMPORT & {name.partition(".")[0] for name in answer["modules"]}


def test_five_thousand_distributions(site: Any) -> None:
    for number in range(5000):
        if number % 100:
            (site.root / f"stranger_{number}-1.0.dist-info").mkdir()
        else:
            site.add(f"plugin-{number}", entries={GROUP: {f"id{number}": "plugin:P"}})
    installed = read_installed([str(site.root)])
    expected = sorted(f"plugin-{number}" for number in range(0, 5000, 100))
    assert [record.name for record in installed.records] == expected
    assert installed.diagnostics == ()
