"""Megatron-Core and MindSpeed where they are absent, broken, or stand-ins. `test_megatron_core` has the real one."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mm_core.megatron
from mm_core.accelerator import Accelerator
from mm_core.megatron import INSTALL, describe, installed, megatron_available, mindspeed_available
from mm_core.megatron.arguments import arguments_of_megatron
from mm_registry.errors import UserError

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(
    megatron_available() or mindspeed_available(), reason="these tests need an environment without the two"
)


def _package(root: Path, name: str, text: str = "") -> None:
    """Write a module and the packages around it; `megatron` itself stays a namespace, as in Megatron-LM."""
    path = root.joinpath(*name.split("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".py").write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("megatron", "mindspeed"):
            del sys.modules[name]


def test_importing_it_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, mm_core.megatron as m, mm_core.megatron.arguments\n"
        "m.describe(), m.megatron_available(), m.mindspeed_available(), m.megatron_training_available()\n"
        "print(sorted({'torch', 'pydantic', 'megatron', 'mindspeed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"


def test_every_name_that_is_offered_exists() -> None:
    assert [name for name in mm_core.megatron.__all__ if not hasattr(mm_core.megatron, name)] == []


@pytest.mark.parametrize("name", ["transformer_config", "initialize_parallel_state", "megatron_module"])
def test_without_megatron_one_sentence_says_how_to_install_it(name: str) -> None:
    argument = "megatron.core" if name == "megatron_module" else {"predictor": {}}
    with pytest.raises(UserError) as caught:
        getattr(mm_core.megatron, name)(argument)
    assert str(caught.value) == (
        "Megatron-Core is not installed, and this needs it: pip install --no-deps megatron-core==0.16.1"
    )


def test_the_version_is_the_same_everywhere() -> None:
    name, version = INSTALL.split()[-1].split("==")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = map(Requirement, project["optional-dependencies"]["megatron"])
    assert extra.name == name
    assert extra.specifier.contains(version)
    assert f"{name}=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert f"$ {INSTALL}\n" in (ROOT / "docs/megatron.md").read_text()


def test_a_package_of_the_same_name_is_not_megatron(site: Path) -> None:
    _package(site, "megatron.__init__", "raise RuntimeError('another megatron')")
    assert not megatron_available()
    assert arguments_of_megatron() is None


def test_destroying_what_is_not_there_does_nothing() -> None:
    mm_core.megatron.destroy_parallel_state()
    assert "megatron" not in sys.modules


def test_doctor_is_told_what_is_absent_and_what_each_is_for() -> None:
    rows = describe()
    assert [(name, version) for name, version, _ in rows] == [
        ("megatron-core", None),
        ("megatron.training", None),
        ("mindspeed", None),
    ]
    assert all(meaning.startswith("optional: ") for _, _, meaning in rows)
    assert rows[0][2].endswith("pip install --no-deps megatron-core==0.16.1")


def test_doctor_is_told_versions_without_an_import(site: Path) -> None:
    _package(site, "megatron.core.__init__", "raise SystemExit('imported')")
    _package(site, "megatron.training.__init__", "raise SystemExit('imported')")
    _package(site, "mindspeed.__init__", "raise SystemExit('imported')")
    assert [version for _, version, _ in describe()] == ["source checkout"] * 3
    info = site / "megatron_core-0.16.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.16.1\n")
    assert describe()[0][1] == "0.16.1"


def test_a_megatron_that_cannot_be_imported_is_one_sentence(site: Path) -> None:
    _package(
        site, "megatron.core.__init__", "raise OSError('libcudart.so.12: cannot open shared object file')"
    )
    with pytest.raises(UserError) as caught:
        mm_core.megatron.transformer_config({"predictor": {}})
    assert str(caught.value) == (
        "Megatron-Core cannot be imported (megatron.core.transformer.transformer_config: OSError: libcudart.so.12: "
        "cannot open shared object file); pip install --no-deps megatron-core==0.16.1"
    )


@pytest.mark.parametrize(("device", "adapted"), [("npu", True), ("cpu", False)])
def test_mindspeed_adapts_megatron_before_it_is_used_on_an_npu(
    site: Path, monkeypatch: pytest.MonkeyPatch, device: str, adapted: bool
) -> None:
    """The accelerator is pretended: no NPU is here."""
    monkeypatch.setattr(Accelerator, "current", staticmethod(lambda: Accelerator(device)))
    _package(site, "megatron.core.__init__", "adapted = False")
    _package(site, "mindspeed.__init__")
    _package(site, "mindspeed.megatron_adaptor", "import megatron.core\nmegatron.core.adapted = True")
    assert mindspeed_available()
    assert installed.megatron_module().adapted is adapted


def test_a_mindspeed_that_cannot_be_imported_is_one_sentence(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "current", staticmethod(lambda: Accelerator("npu")))
    _package(site, "megatron.core.__init__")
    _package(site, "mindspeed.__init__")
    _package(site, "mindspeed.megatron_adaptor", "from megatron.core import gone")
    with pytest.raises(
        UserError, match=r"^MindSpeed cannot be imported \(mindspeed.megatron_adaptor: ImportError: .*fit$"
    ):
        installed.megatron_module()


TRAINING = {
    "megatron.training.__init__": "from megatron.training.global_vars import get_args\n",
    "megatron.training.global_vars": """
_GLOBAL_ARGS = None

def get_args():
    assert _GLOBAL_ARGS is not None, "args is not initialized."
    return _GLOBAL_ARGS

def set_args(args):
    global _GLOBAL_ARGS
    _GLOBAL_ARGS = args
""",
}


def test_megatron_gets_arguments_and_gives_back_only_ours(tmp_path: Path) -> None:
    for name, text in TRAINING.items():
        _package(tmp_path, name, text)
    code = """
from mm_core.megatron.arguments import arguments_of_megatron, hand_over, take_back
assert arguments_of_megatron() is None
ours, theirs = object(), object()
hand_over(ours)
from megatron.training import get_args, global_vars
assert get_args() is arguments_of_megatron() is ours
take_back(theirs)
assert get_args() is ours
take_back(ours)
assert arguments_of_megatron() is None
global_vars.set_args(theirs)
hand_over(ours)
assert get_args() is theirs
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "has arguments already" in done.stderr
