"""Three broken plugins installed at once: code that is no Python, a dependency that is missing, damaged metadata.
Every command goes on working for all other ids, and says what is wrong with these.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = "examples/tiny/wan22-t2v/model.json"
pytestmark = pytest.mark.timeout(240)

PROJECT = """\
[build-system]
requires = ["setuptools>=77.0.3"]
build-backend = "setuptools.build_meta"

[project]
name = "mmzoo-plugin-{name}"
version = "1.2"
dependencies = ["mmzoo-core>=0.1,<0.2", "mmzoo-registry>=0.1,<0.2"{more}]

[project.entry-points."mm_core.{group}"]
{name}_part = "mm_plugin_{name}.part:Part"

[project.entry-points."mm_core.configs"]
"{role}/{name}_part" = "mm_plugin_{name}.config:PartConfig"

[tool.setuptools.packages.find]
include = ["mm_plugin_*"]
"""
CONFIG = """\
from mm_core.config.section import SectionModel


class PartConfig(SectionModel):
    size: int = 1
"""
PARTS = {
    "syntax": ("ae_models", "ae", "", "class Part(\n    pass\n"),
    "needy": ("predictor_models", "predictor", ', "mmzoo-absent-library>=2"', "import absent_library\n\n\nclass Part: pass\n"),
    "garbled": ("text_encoders", "text_encoder", "", "class Part: pass\n"),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Broken:
    """The environment with all three; `garbled` is what the third one's metadata folder holds when undamaged."""

    environment: Any
    garbled: Path

    def mm(self, *arguments: str | Path, cwd: Path = ROOT) -> Result:
        env = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MM_", "PIP_"))
        }
        done = subprocess.run(
            [self.environment.root / "bin" / "mm", *map(str, arguments)],
            cwd=cwd, env={**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def installed_broken(
    wheels: dict[str, Path], make_environment: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Broken:
    """Build the three as wheels and install them with pip, beside the core and our own plugins."""
    folder = tmp_path_factory.mktemp("broken")
    for name, (group, role, more, source) in PARTS.items():
        package = folder / name / f"mm_plugin_{name}"
        package.mkdir(parents=True)
        project = PROJECT.format(name=name, group=group, role=role, more=more)
        (folder / name / "pyproject.toml").write_text(project, encoding="utf-8")
        (package / "__init__.py").write_text("", encoding="utf-8")
        (package / "part.py").write_text(source, encoding="utf-8")
        (package / "config.py").write_text(CONFIG, encoding="utf-8")
    built = folder / "wheels"
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(built)]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, *(str(folder / name) for name in PARTS)],
        capture_output=True, text=True, timeout=200, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    environment = make_environment(*wheels.values(), *built.glob("*.whl"))
    (info,) = environment.root.glob("lib/python*/site-packages/mmzoo_plugin_garbled-*.dist-info")
    return Broken(environment, info)


def damage_metadata(info: Path) -> None:
    (info / "METADATA").write_bytes(
        b"Metadata-Version: 2.4\nName: mmzoo-plugin-garbled\nAuthor: \xff\xfe\x80\nVer"
    )


def damage_entry_points(info: Path) -> None:
    with (info / "entry_points.txt").open("ab") as file:
        file.write(b"this is neither a section nor an entry\n")


def damage_encoding(info: Path) -> None:
    with (info / "entry_points.txt").open("ab") as file:
        file.write(b'"ae/\xe9\xff" = mm_plugin_garbled.part:Part\n')


DAMAGES = {"metadata": damage_metadata, "entry-points": damage_entry_points, "encoding": damage_encoding}


@pytest.fixture(params=DAMAGES)
def broken(request: pytest.FixtureRequest, installed_broken: Broken, tmp_path: Path) -> Iterator[Broken]:
    """All three installed, the third one damaged in one of three ways."""
    kept = tmp_path / ".kept"
    shutil.copytree(installed_broken.garbled, kept)
    DAMAGES[request.param](installed_broken.garbled)
    yield installed_broken
    shutil.rmtree(installed_broken.garbled)
    shutil.copytree(kept, installed_broken.garbled)


@pytest.fixture
def damaged(installed_broken: Broken, tmp_path: Path) -> Iterator[Broken]:
    """All three installed, the third one's METADATA not UTF-8."""
    kept = tmp_path / ".kept"
    shutil.copytree(installed_broken.garbled, kept)
    damage_metadata(installed_broken.garbled)
    yield installed_broken
    shutil.rmtree(installed_broken.garbled)
    shutil.copytree(kept, installed_broken.garbled)


def test_list_and_doctor_name_the_damage_and_show_the_rest(broken: Broken) -> None:
    listed = broken.mm("list", "--format", "json")
    assert listed.code == 0
    ids = {(entry["id"], entry["status"]) for entry in listed.json}
    assert {("wandit", "available"), ("haar_video", "available"), ("UMT5", "available")} <= ids
    assert {("syntax_part", "available"), ("needy_part", "available")} <= ids
    assert "garbled_part" not in {id for id, _ in ids}
    assert "mmzoo-plugin-garbled" in listed.err

    told = broken.mm("doctor", "--format", "json")
    assert told.code == 2
    errors = {found["distribution"]: found for found in told.json["problems"] if found["level"] == "error"}
    assert set(errors) == {f"mmzoo-plugin-{name}" for name in PARTS}
    assert errors["mmzoo-plugin-garbled"]["code"] == "unreadable-metadata"
    assert "force-reinstall" in errors["mmzoo-plugin-garbled"]["mend"]
    assert errors["mmzoo-plugin-syntax"]["code"] == "syntax-error"
    assert "part.py:1" in errors["mmzoo-plugin-syntax"]["message"]
    assert errors["mmzoo-plugin-needy"]["code"] == "missing-requirement"
    assert errors["mmzoo-plugin-needy"]["mend"] == "Run: pip install 'mmzoo-absent-library>=2'"
    plugins = {each["distribution"] for each in told.json["plugins"]}
    assert {"mmzoo-core", "mmzoo-plugin-wan22", "mmzoo-plugin-haar"} <= plugins
    assert "mmzoo-plugin-garbled" in broken.mm("doctor").out


def test_show_and_explain(damaged: Broken) -> None:
    for id in ("wandit", "haar_video", "syntax_part", "needy_part"):
        assert f"{id}: " in damaged.mm("show", id).out
        explained = damaged.mm("plugin", "explain", id)
        assert explained.code == 0
        assert id in explained.out
    gone = damaged.mm("show", "garbled_part")
    assert gone.code == 2
    assert "no installed distribution offers 'garbled_part'" in gone.err
    assert "cannot be read" in gone.err
    assert len(gone.err) <= 1200
    explained = damaged.mm("plugin", "explain", "garbled_part")
    assert explained.code == 0
    assert "cannot be read" in explained.out


def test_jobs_are_checked(damaged: Broken, tmp_path: Path) -> None:
    assert damaged.mm("check", MODEL).code == 0
    text = (ROOT / MODEL).read_text(encoding="utf-8")
    for old, new, expected in (
        ('"haar_video"', '"garbled_part"', "no installed distribution offers the ae 'garbled_part'"),
        ('"UMT5"', '"garbled_part"', "no installed distribution offers the text encoder 'garbled_part'"),
    ):
        (tmp_path / "model.json").write_text(text.replace(old, new), encoding="utf-8")
        result = damaged.mm("check", tmp_path / "model.json")
        assert result.code == 2
        assert expected in result.out
        assert "cannot be read" in result.out


def test_asking_for_them_says_why_not_and_the_rest_goes_on(damaged: Broken) -> None:
    told = damaged.environment.evaluate(
        "import mm_core, mm_registry\n"
        "said = {}\n"
        "for mapping, id in ((mm_core.AE_MODEL_MAPPINGS, 'syntax_part'), (mm_core.PREDICTOR_MODEL_MAPPINGS, 'needy_part')):\n"
        "    try: mapping[id]\n"
        "    except mm_registry.BrokenPluginError as error: said[id] = str(error)\n"
        "said['haar'] = mm_core.AE_MODEL_MAPPINGS['haar_video'].__name__\n"
        "show(said)"
    )
    assert "SyntaxError" in told["syntax_part"]
    assert "part.py" in told["syntax_part"]
    assert "needs the module 'absent_library', which is not installed" in told["needy_part"]
    assert told["haar"] == "HaarVideoAutoencoder"


@pytest.mark.parametrize("name", PARTS)
def test_each_can_be_disabled_and_enabled(damaged: Broken, name: str) -> None:
    distribution = f"mmzoo-plugin-{name}"
    file = damaged.environment.root / "etc" / "mmzoo" / "plugins.toml"
    off = damaged.mm("plugin", "disable", distribution, "--format", "json")
    assert (off.code, off.json["changed"], off.json["takes_part"]) == (0, True, False)
    assert Path(off.json["file"]) == file
    entries = damaged.mm("list", "--format", "json").json
    assert {e["status"] for e in entries if e["distribution"] == distribution} <= {"blocked"}
    assert {e["status"] for e in entries if e["distribution"] == "mmzoo-plugin-wan22"} == {"available"}
    # Its errors are notes now: whoever disabled it knows.
    problems = damaged.mm("doctor", "--format", "json").json["problems"]
    if name != "garbled":  # what cannot be read cannot be told to be blocked either
        assert {found["code"] for found in problems if found["distribution"] == distribution} == {"blocked"}
    on = damaged.mm("plugin", "enable", distribution, "--format", "json")
    assert (on.code, on.json["changed"], on.json["takes_part"]) == (0, True, True)
    assert "blocked" not in {e["status"] for e in damaged.mm("list", "--format", "json").json}


def test_lock_and_verify(damaged: Broken, tmp_path: Path) -> None:
    locked = damaged.mm("plugin", "lock", cwd=tmp_path)
    assert locked.code == 0, locked.err
    text = (tmp_path / "mmzoo.lock").read_text(encoding="utf-8")
    names = {each["name"] for each in json.loads(text)["distributions"]}
    assert {"mmzoo-plugin-wan22", "mmzoo-plugin-haar", "mmzoo-plugin-syntax", "mmzoo-plugin-needy"} <= names
    verified = damaged.mm("plugin", "verify", "--files", cwd=tmp_path)
    assert verified.code == 0, verified.out
    for said in (locked.err, verified.err):
        assert "the metadata of mmzoo-plugin-garbled" in said


def test_the_kit_tells_broken_from_sound(damaged: Broken) -> None:
    check = ("plugin", "check", "--import", "--only", "target-exists", "--format", "json")
    for name, why in {"syntax": "SyntaxError", "needy": "needs the module 'absent_library'"}.items():
        result = damaged.mm(*check, f"mmzoo-plugin-{name}")
        assert result.code == 2, result.err
        (failed,) = (found for found in result.json["results"] if found["status"] == "failed")
        assert why in failed["message"]
        assert failed["subject"].endswith(f"/{name}_part")
    gone = damaged.mm("plugin", "check", "mmzoo-plugin-garbled")
    assert gone.code == 2
    assert "mmzoo-plugin-garbled" in gone.err
    assert "cannot be read" in gone.err
    assert damaged.mm("plugin", "check", "mmzoo-plugin-haar").code == 0
