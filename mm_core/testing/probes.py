"""Questions about an installation, each answered in a fresh process that imports no plugin."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.testing.survey import HEAVY, TIME_LIMIT, absolute_path, child_environment

if TYPE_CHECKING:
    from mm_core.testing.case import Plugin


def modules_after_discovery(plugin: Plugin) -> list[str]:
    """Start Python as it starts with the plugin installed, let the registry read and answer, and return which modules of
    the plugin, and which heavy ones, are imported then.
    """
    packages = {value.partition(":")[0].partition(".")[0].strip() for _, _, value in plugin.record.entries}
    packages -= {"mm_core", "mm_registry"}  # which ask the question
    job = {
        "path": absolute_path(),
        "location": str(Path(plugin.record.info).parent),
        "watched": sorted(packages | HEAVY),
    }
    found: list[str] = _ask("discover", job)
    return found


def after_uninstall(plugin: Plugin, remaining: Path) -> dict[str, Any]:
    """Return what the registry says where the plugin's recorded files are not: {"version", "left", "errors"}.

    Args:
        remaining: an empty folder to lay out what stays beside the plugin, as links.
    """
    location = Path(plugin.record.info).parent
    removed = {name.partition("/")[0] for name in recorded_files(plugin) or [Path(plugin.record.info).name]}
    for entry in location.iterdir():
        if entry.name not in removed and (
            entry.suffix in (".dist-info", ".egg-info") or entry.suffix == ".egg"
        ):
            (remaining / entry.name).symlink_to(entry)
    leftovers = build_folders(plugin) - {str(location)}
    path = [str(remaining) if entry == str(location) else entry for entry in absolute_path()]
    wanted = [(spec.group, spec.id) for spec in plugin.components]
    job = {
        "path": [entry for entry in path if entry not in leftovers],
        "distribution": plugin.distribution,
        "ids": wanted,
    }
    # Without `site`, nothing of the plugin's can run at start-up either.
    answer: dict[str, Any] = _ask("uninstalled", job, "-S")
    return answer


def build_folders(plugin: Plugin) -> set[str]:
    """Folders on the path that hold what a build left there, which is not installed: the working directory, and the
    source of an editable install.
    """
    return {os.getcwd(), *([str(Path(plugin.record.path).resolve())] if plugin.record.editable else [])}


def recorded_files(plugin: Plugin) -> list[str]:
    """The files that pip would remove, relative to the folder of the distribution; empty if none is recorded."""
    import csv

    try:
        text = (Path(plugin.record.info) / "RECORD").read_text(encoding="utf-8")
    except OSError:
        return []
    return [row[0] for row in csv.reader(text.splitlines()) if row]


def _ask(question: str, job: Mapping[str, Any], *flags: str) -> Any:
    environment = child_environment()
    roots = [_root(name) for name in ("mm_core", "mm_registry", "packaging")]
    environment["PYTHONPATH"] = os.pathsep.join([*roots, environment["PYTHONPATH"]])
    command = [sys.executable, "-P", *flags, "-m", "mm_core.testing.probes", question]
    done = subprocess.run(
        command,
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the question {question!r} failed\n{done.stderr[-2000:]}")
    # What a plugin prints at start-up comes before the answer.
    return json.loads(done.stdout.splitlines()[-1])


def _root(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parents[1])


# The answers


def _discover(job: Mapping[str, Any]) -> list[str]:
    import site

    sys.path[:] = job["path"]
    if job["location"] not in site.getsitepackages():
        site.addsitedir(job["location"])  # its .pth files run, as they would at a real start
    from mm_registry import GROUPS, Registry, default_manager

    manager = default_manager()
    manager.discover()
    for group in GROUPS:
        registry: Registry[Any] = Registry(group, manager)
        _ = repr(registry), len(registry), "no_such_id" in registry, registry.specs()
    return sorted(name for name in sys.modules if name.partition(".")[0] in job["watched"])


def _uninstalled(job: Mapping[str, Any]) -> dict[str, Any]:
    sys.path.extend(entry for entry in job["path"] if entry not in sys.path)
    from mm_registry import AmbiguousIdError, PluginManager, RegistryError, UnknownIdError
    from mm_registry.spec import canonical_name

    manager = PluginManager(job["path"])
    wanted = canonical_name(job["distribution"])
    left = [
        f"{spec.group} {spec.id} ({spec.path})"
        for spec in manager.discover().entries
        if canonical_name(spec.distribution) == wanted
    ]
    wrong: list[str] = []
    for group, id in job["ids"]:
        try:
            manager.resolve(group, id)
        except UnknownIdError as error:
            if id not in str(error) or len(str(error).encode()) > 1024:
                wrong.append(f"the message about {id!r} is {str(error)!r}")
        except AmbiguousIdError:
            continue  # others offer it
        except RegistryError as error:
            wrong.append(f"{id!r} in {group}: {error}")
    return {"left": left, "wrong": wrong}


def _main(arguments: Sequence[str]) -> None:
    answers = {"discover": _discover, "uninstalled": _uninstalled}
    answer = answers[arguments[0]](json.loads(sys.stdin.read()))
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
