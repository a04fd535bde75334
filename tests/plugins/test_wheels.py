"""Our distributions as users get them: built as wheels, installed in a fresh environment, removed."""

from __future__ import annotations

import configparser
import email
import subprocess
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)
DISTRIBUTIONS = (
    "mmzoo-core",
    "mmzoo-plugin-haar",
    "mmzoo-plugin-ltx",
    "mmzoo-plugin-wan22",
    "mmzoo-registry",
)
HEAVY = ("torch", "transformers", "diffusers")

PROVENANCE = """
import mm_core, mm_registry
manager = mm_registry.default_manager()
assert mm_core.PREDICTOR_MODEL_MAPPINGS.manager is manager
report = manager.discover()
show({
    "files": [mm_core.__file__, mm_registry.__file__],
    "entries": [
        [s.group, s.id, s.distribution, s.version, s.origin, s.editable, s.path, s.status]
        for s in report.entries
    ],
    "diagnostics": [str(diagnostic) for diagnostic in report.diagnostics],
    "questions": [
        "wandit" in mm_core.PREDICTOR_MODEL_MAPPINGS,
        sorted(mm_core.AE_MODEL_MAPPINGS),
        repr(mm_core.AE_MODEL_MAPPINGS),
    ],
    "modules": sorted(sys.modules),
})
"""

ASK = """
import mm_core, mm_registry
answers = {}
for mapping, id in [("PREDICTOR_MODEL_MAPPINGS", "wandit"), ("PREDICTOR_MODEL_MAPPINGS", "wandi"),
                    ("AE_MODEL_MAPPINGS", "wandit"), ("AE_MODEL_MAPPINGS", "haar_video")]:
    try:
        answers[f"{mapping} {id}"] = getattr(mm_core, mapping).spec(id).provider
    except mm_registry.UnknownIdError as error:
        answers[f"{mapping} {id}"] = str(error)
show([answers, sorted(sys.modules)])
"""

# Config classes, policies and hooks are read while a job is checked: nothing heavy may come with them.
LIGHT = """
import mm_registry
manager = mm_registry.default_manager()
loaded = {}
for group in ("mm_core.configs", "mm_core.sharding_policies", "mm_core.hooks"):
    for spec in manager.specs(group):
        loaded[f"{spec.group} {spec.id}"] = type(manager.load(spec)).__name__
show([loaded, sorted(sys.modules)])
"""

HAAR = """
import mm_core
component = mm_core.AE_MODEL_MAPPINGS["haar_video"]
show([component.__name__, sys.modules[component.__module__].__file__])
"""


def heavy(modules: list[str]) -> set[str]:
    plugins = {"mm_plugin_wan22", "mm_plugin_haar", "mm_plugin_ltx"}
    return {name.partition(".")[0] for name in modules} & {*HEAVY, *plugins}


@pytest.fixture
def declared(sources: dict[str, Path]) -> dict[str, dict[str, dict[str, str]]]:
    """Distribution -> group -> id -> target, as in its pyproject.toml."""
    projects = {
        name: tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for name, folder in sources.items()
    }
    return {name: project.get("entry-points", {}) for name, project in projects.items()}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_wheel_is_complete(
    wheels: dict[str, Path], declared: dict[str, dict[str, dict[str, str]]], distribution: str
) -> None:
    with zipfile.ZipFile(wheels[distribution]) as wheel:
        names = wheel.namelist()
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = email.message_from_string(wheel.read(f"{info}/METADATA").decode())
        parser = configparser.ConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        if f"{info}/entry_points.txt" in names:
            parser.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    entries = {group: dict(parser[group]) for group in parser.sections() if group.startswith("mm_core.")}
    assert entries == declared[distribution]
    for ids in entries.values():
        for target in ids.values():
            module = target.partition(":")[0].replace(".", "/")
            assert {f"{module}.py", f"{module}/__init__.py"} & set(names), f"{target} is not in the wheel"
    packages = {name.partition("/")[0] for name in names} - {info}
    assert len(packages) == 1
    assert f"{packages.pop()}/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload(), "the description is empty"
    if distribution.startswith("mmzoo-plugin-"):
        ranges = [line for line in metadata.get_all("Requires-Dist", []) if line.startswith("mmzoo-")]
        assert sorted(ranges) == ["mmzoo-core<0.2,>=0.1", "mmzoo-registry<0.2,>=0.1"]


def test_installed_wheels_are_found_with_their_provenance(
    wheels: dict[str, Path], declared: dict[str, dict[str, dict[str, str]]], installed: Any
) -> None:
    told = installed.evaluate(PROVENANCE)
    assert all(file.startswith(str(installed.root)) for file in told["files"])
    assert told["diagnostics"] == []
    found = {(group, id): rest for group, id, *rest in told["entries"]}
    expected = {
        (group, id): distribution
        for distribution, groups in declared.items()
        for group, ids in groups.items()
        for id in ids
    }
    assert {key: rest[0] for key, rest in found.items()} == expected
    for distribution, version, origin, editable, path, status in found.values():
        assert version == "0.1.0"
        assert origin == f"wheel {wheels[distribution]}"
        assert not editable
        assert path.startswith(str(installed.root))
        assert status == "available"
    assert told["questions"] == [
        True,
        ["haar_video", "ltx_video_vae", "wan_video_vae"],
        "<Registry mm_core.ae_models: haar_video, ltx_video_vae, wan_video_vae>",
    ]
    assert not heavy(told["modules"])


def test_what_a_check_reads_of_a_plugin_is_light(installed: Any) -> None:
    loaded, modules = installed.evaluate(LIGHT)
    assert "mm_core.configs predictor/wandit" in loaded
    assert "mm_core.sharding_policies predictor/wandit" in loaded
    assert not {name.partition(".")[0] for name in modules} & set(HEAVY)


def test_installed_plugin_is_imported_from_its_wheel(installed: Any) -> None:
    name, file = installed.evaluate(HAAR)
    assert name == "HaarVideoAutoencoder"
    assert file.startswith(str(installed.root))


def test_command_is_installed(installed: Any) -> None:
    done = subprocess.run(
        [installed.root / "bin" / "mm", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "mm (mmzoo-core) 0.1.0\n"


def test_removed_plugin_is_gone_and_the_message_says_how_to_get_it_back(
    wheels: dict[str, Path], make_environment: Callable[..., Any]
) -> None:
    environment = make_environment(*wheels.values())
    before, _ = environment.evaluate(ASK)
    assert before["PREDICTOR_MODEL_MAPPINGS wandit"] == "mmzoo-plugin-wan22 0.1.0"

    environment.pip("uninstall", "-y", "mmzoo-plugin-wan22")
    after, modules = environment.evaluate(ASK)
    not_installed = "is not installed; run `pip install ./mm_plugins/wan22` in a clone of MM Zoo"
    assert after["PREDICTOR_MODEL_MAPPINGS wandit"] == (
        "no installed distribution offers the predictor 'wandit'; "
        f"mmzoo-plugin-wan22 does, and {not_installed}"
    )
    assert after["PREDICTOR_MODEL_MAPPINGS wandi"] == (
        "no installed distribution offers the predictor 'wandi'; "
        "did you mean 'wandit' (of mmzoo-plugin-wan22, which is not installed: "
        "`pip install ./mm_plugins/wan22` in a clone of MM Zoo)?"
    )
    assert "'wandit' is a predictor, not an ae" in after["AE_MODEL_MAPPINGS wandit"]
    assert after["AE_MODEL_MAPPINGS haar_video"] == "mmzoo-plugin-haar 0.1.0"
    assert not heavy(modules)

    environment.install(wheels["mmzoo-plugin-wan22"])
    again, _ = environment.evaluate(ASK)
    assert again == before


def test_registry_stands_alone(wheels: dict[str, Path], make_environment: Callable[..., Any]) -> None:
    environment = make_environment(wheels["mmzoo-registry"])
    ids, core = environment.evaluate(
        "import importlib.util, mm_registry\n"
        "manager = mm_registry.default_manager()\n"
        "show([[s.id for s in manager.discover().entries], importlib.util.find_spec('mm_core') is None])"
    )
    assert ids == []
    assert core
