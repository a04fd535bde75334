"""`mm plugin new`: what it writes works, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mm_core.cli.plugin_new import api_range
from mm_registry import default_manager
from tests.e2e.conftest import ENVIRONMENT, ROOT, TINY, run_mm
from tests.e2e.pages import Environment

pytestmark = pytest.mark.timeout(600)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module", params=["predictor", pytest.param("ae", marks=pytest.mark.slow)])
def new(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plugin of each role, as written."""
    parent = tmp_path_factory.mktemp(request.param)
    result = run_mm("plugin", "new", "fresh-one", "--role", request.param, cwd=parent)
    assert result.code == 0, result.err
    return parent / "mmzoo-plugin-fresh-one"


def test_its_files_are_listed_and_whole(new: Path) -> None:
    written = {name for name, text in contents(new).items() if (new / name).is_file()}
    role = "predictor" if "predictor" in new.parent.name else "ae"
    module = {"predictor": "predictor.py", "ae": "autoencoder.py"}[role]
    package = ("__init__.py", "py.typed", "config.py", "hooks.py", "examples.py", module)
    expected = {f"mm_plugin_fresh_one/{name}" for name in package}
    expected |= {".gitignore", "README.md", "model.json", "pyproject.toml", "tests/test_conformance.py"}
    if role == "predictor":
        expected.add("mm_plugin_fresh_one/policy.py")
    assert written == expected
    assert not [name for name, text in contents(new).items() if "$" in text.replace("$ ", "")]
    assert os.listdir(new.parent) == [new.name]  # no temporary folder is left
    umask = os.umask(0)
    os.umask(umask)
    assert new.stat().st_mode & 0o777 == 0o777 & ~umask


def test_its_metadata_names_this_api(new: Path) -> None:
    project = tomllib.loads((new / "pyproject.toml").read_text())["project"]
    assert project["name"] == "mmzoo-plugin-fresh-one"
    ranges = {Requirement(line).name: Requirement(line).specifier for line in project["dependencies"]}
    assert set(ranges) == {"mmzoo-core", "mmzoo-registry"}
    for name, specifier in ranges.items():
        version = default_manager().version(name)
        assert version is not None
        assert specifier.contains(version)
        assert not specifier.contains("99")
    for group, entries in project["entry-points"].items():
        for id, target in entries.items():
            assert id.rpartition("/")[2] == "fresh_one", group
            module = target.partition(":")[0].replace(".", "/")
            assert (new / f"{module}.py").is_file()


@pytest.mark.parametrize(
    ("version", "inside", "outside"),
    [
        ("0.1.0", ["0.1.0", "0.1.9"], ["0.0.9", "0.2.0", "1.0"]),
        ("0.12.3", ["0.12.0", "0.12.9"], ["0.11.9", "0.13.0"]),
        ("1.2.3", ["1.2.0", "1.9"], ["1.1", "2.0"]),
        ("0.2.0.dev3", ["0.2.0.dev3", "0.2.0", "0.2.1"], ["0.1.9", "0.3.0"]),
        ("2.0rc1", ["2.0rc1", "2.0", "2.5"], ["1.9", "3.0"]),
    ],
)
def test_ranges_end_where_the_api_may_change(version: str, inside: list[str], outside: list[str]) -> None:
    found = SpecifierSet(api_range(version))
    assert all(found.contains(each, prereleases=True) for each in inside)
    assert not any(found.contains(each, prereleases=True) for each in outside)


@pytest.mark.slow
def test_its_code_passes_ruff_and_mypy(new: Path, tmp_path: Path) -> None:
    def run(*command: str | Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)], cwd=new, capture_output=True, text=True, timeout=280,
            env={**ENVIRONMENT, "MYPYPATH": f"{ROOT}:{ROOT / 'registry'}", "RUFF_NO_CACHE": "true"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    for config in ([], ["--config", ROOT / "pyproject.toml"]):  # its own settings, and ours
        run("ruff", "check", *config, ".")
        run("ruff", "format", "--check", *config, ".")
    strict = (
        "--disallow-untyped-defs",
        "--check-untyped-defs",
        "--ignore-missing-imports",
        "--follow-imports=silent",
    )
    run("mypy", "--config-file=", "--cache-dir", tmp_path, *strict, "mm_plugin_fresh_one")


def test_it_works_at_once(new: Path, tmp_path: Path) -> None:
    """Install, check, train on the tiny data; for the autoencoder also the kit (the predictor's: test_docs_plugins)."""
    environment = Environment.make(tmp_path / "venv")

    def run(command: str, folder: Path = tmp_path) -> str:
        done = environment.run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(f"pip install -e {new}")
    assert run(f"mm check {new / 'model.json'}") == "nothing to say: no errors, warnings or notes\n"
    run(
        f"mm train --mm-model {new / 'model.json'} --mm-data {TINY / 'data.json'} --num-workers 0 --lr 1e-3 "
        f"--train-iters 2 --save {tmp_path / 'run'}",
        ROOT,
    )
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert [overwrite["by"] for overwrite in config["overwrites"]] == ["mmzoo-plugin-fresh-one 0.1.0"]
    if new.parent.name.startswith("ae"):
        said = run(f"pytest {new / 'tests'}")
        assert int(re.findall(r"(\d+) passed", said)[0]) >= 50
        assert "failed" not in said
    again = environment.run("mm plugin new fresh_one --role " + re.sub(r"\d", "", new.parent.name), tmp_path)
    assert again.returncode == 2
    assert "'fresh_one' is offered by mmzoo-plugin-fresh-one 0.1.0 already" in again.stderr


def test_json_says_what_was_written(tmp_path: Path) -> None:
    result = run_mm("plugin", "new", "two_words", "--path", tmp_path, "--format", "json")
    told = json.loads(result.out)
    assert (told["id"], told["role"]) == ("two_words", "predictor")
    assert (told["distribution"], told["package"]) == ("mmzoo-plugin-two-words", "mm_plugin_two_words")
    folder = Path(told["folder"])
    assert folder == tmp_path / "mmzoo-plugin-two-words"
    assert sorted(told["files"]) == [name for name in contents(folder) if (folder / name).is_file()]
    assert len(told["commands"]) == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MyDiT", 'Write "mydit"'),
        ("my dit", 'Write "my_dit"'),
        ("2dit", "begins with a letter"),
        ("my__dit", 'Write "my_dit"'),
        ("dit_", 'Write "dit"'),
        ("../dit", 'Write "dit"'),
        ("", "cannot be a NAME"),
        ("d" * 41, "at most 40 characters"),
        ("class", "a name of Python's own"),
        ("match", "a name of Python's own"),
        ("json", "a name of Python's own"),
        ("mmzoo-plugin-dit", 'Write "dit"'),
        ("wandit", "the predictor 'wandit' is offered by mmzoo-plugin-wan22 0.1.0 already"),
        ("dít", "lower-case letters and digits"),
    ],
)
def test_names_that_cannot_be_are_refused(tmp_path: Path, name: str, said: str) -> None:
    result = run_mm("plugin", "new", name, "--path", tmp_path)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the plugin's NAME is missing"),
        (["one", "two"], 'unexpected argument "two"'),
        (["one", "--rol", "ae"], 'unexpected argument "--rol"'),
        (["one", "--role", "predicter"], 'Did you mean "predictor"?'),
        (["one", "--role", "dataset"], "There are templates for predictor and ae"),
        (["one", "--path", "nowhere"], "--path 'nowhere' does not exist"),
        (["one", "--path"], "a value is missing"),
        (["one", "--format", "yaml"], '"yaml" is no format'),
    ],
)
def test_wrong_command_lines_are_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    result = run_mm("plugin", "new", *arguments, cwd=tmp_path)
    assert result.code == 2
    assert said in result.err
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "mmzoo-plugin-mine"
    folder.mkdir()
    (folder / "precious").write_text("text")
    for _ in range(2):
        result = run_mm("plugin", "new", "mine", "--path", tmp_path)
        assert result.code == 2
        assert f"{folder} exists already and nothing is overwritten" in result.err
        if (folder / "precious").exists():
            assert contents(tmp_path) == {"mmzoo-plugin-mine": "", "mmzoo-plugin-mine/precious": "text"}
            (folder / "precious").unlink()
            folder.rmdir()
            folder.symlink_to(tmp_path / "gone")  # a link to nothing is something, too
    assert folder.is_symlink()


def test_a_folder_that_cannot_be_written_is_an_error() -> None:
    result = run_mm("plugin", "new", "mine", "--path", "/proc/self")
    assert result.code == 2
    assert "mmzoo-plugin-mine cannot be written" in result.err


def test_it_imports_neither_torch_nor_pydantic(tmp_path: Path) -> None:
    code = (
        "import sys; from mm_core.cli.main import main\n"
        "code = main(['plugin', 'new', 'light'])\n"
        "sys.exit(code or 10 * bool({'torch', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0


def test_commands_can_be_pasted_from_a_folder_with_a_space(tmp_path: Path) -> None:
    (tmp_path / "my plugins").mkdir()
    result = run_mm("plugin", "new", "spaced", "--path", "my plugins", cwd=tmp_path)
    assert "pip install -e 'my plugins/mmzoo-plugin-spaced'\n" in result.out


def test_a_name_without_end_is_told_in_short(tmp_path: Path) -> None:
    result = run_mm("plugin", "new", "x" * 5000, cwd=tmp_path)
    assert result.code == 2
    assert len(result.err) < 400
