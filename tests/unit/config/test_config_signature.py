"""A component without a config class: its section is checked by its constructor's arguments, read from source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mm_core.config.file_check import check_file
from mm_core.config.findings import Finding
from mm_core.config.signature import Signature, UnreadableError, read_signature
from mm_registry import PluginManager

BOMB = "raise RuntimeError('the plugin was imported')\n"
PREDICTOR = '''\
raise RuntimeError("the plugin was imported")
import torch
from torch import nn


class Toy(nn.Module):
    def __init__(self, *, in_dim: int, out_dim: int = 16, rate: float = 0.5, name: "str | None" = None,
                 shape: tuple[int, ...] = (1,), flag: bool = False) -> None:
        super().__init__()


class Open(nn.Module):
    def __init__(self, in_dim: int, **kwargs) -> None: ...


class Nothing(nn.Module):
    pass


class Child(Nothing, Toy):
    pass


class Inner:
    class Deep(Open):
        def __init__(self, deep): ...


def make(width, *, depth=2): ...


class Loaded:
    def __init__(self, z_dim, extra=1): ...

    @classmethod
    def from_pretrained(cls, folder, *, dtype, tiling: bool = False, **fields): ...


Alias = Toy
Twice = Toy
Twice = Open
Made = type("Made", (), {})


@make
class Decorated: ...


class Meta(metaclass=make): ...


class New:
    def __new__(cls): ...


class Lost(nn.NoSuchModule): ...


class Based(make(1)): ...


class Circle(Circle): ...


class PositionOnly:
    def __init__(self, a, /): ...
'''  # fmt: skip


def package(folder: Path, name: str = "toy_sig", **more: str) -> None:
    """An installed distribution whose package fails if anything of it is imported."""
    root = folder / name
    (root / "deep").mkdir(parents=True)
    (root / "__init__.py").write_text(
        BOMB + f"from .predictor import Toy as Exported\nfrom {name}.deep import *\n"
    )
    (root / "deep" / "__init__.py").write_text(BOMB + "from ..predictor import Open\n")
    (root / "predictor.py").write_text(PREDICTOR)
    (root / "broken.py").write_text("class Toy(:\n")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    entries = "".join(
        f"[mm_core.{group}]\n" + "".join(f"{id} = {name}.{target}\n" for id, target in ids.items())
        for group, ids in {
            "predictor_models": {
                "toy": "predictor:Toy", "toy_open": "predictor:Open", "toy_made": "predictor:Made"
            },
            "ae_models": {"toy_loaded": "predictor:Loaded"},
        }.items()
    )  # fmt: skip
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    package(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def read(target: str, method: str = "__init__") -> Signature:
    return read_signature(f"toy_sig.{target}", method)


@pytest.mark.parametrize(
    ("target", "names", "required", "is_open"),
    [
        ("predictor:Toy", ["in_dim", "out_dim", "rate", "name", "shape", "flag"], ["in_dim"], False),
        ("predictor:Open", ["in_dim"], ["in_dim"], True),
        ("predictor:Nothing", [], [], False),
        ("predictor:Child", ["in_dim", "out_dim", "rate", "name", "shape", "flag"], ["in_dim"], False),
        ("predictor:Inner.Deep", ["deep"], ["deep"], False),
        ("predictor:make", ["width", "depth"], ["width"], False),
        ("predictor:Alias", ["in_dim", "out_dim", "rate", "name", "shape", "flag"], ["in_dim"], False),
        ("deep:Open", ["in_dim"], ["in_dim"], True),
    ],
)
def test_arguments_are_read_without_an_import(
    site: Path, target: str, names: list[str], required: list[str], is_open: bool
) -> None:
    signature = read(target)
    assert list(signature.parameters) == names
    assert [name for name, parameter in signature.parameters.items() if parameter.required] == required
    assert signature.open is is_open
    assert "toy_sig" not in sys.modules


def test_names_that_a_package_exports_are_followed(site: Path) -> None:
    assert "in_dim" in read_signature("toy_sig:Exported").parameters


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("predictor:Made", "is made when the module is imported"),
        ("predictor:Twice", "is defined more than once"),
        ("predictor:Absent", "is defined nowhere that the source shows"),
        ("predictor:Decorated", "is decorated with make"),
        ("predictor:Meta", "is made with metaclass=make"),
        ("predictor:New", "has a __new__ of its own"),
        ("predictor:Lost", "torch.nn.NoSuchModule"),
        ("predictor:Based", "has the base make(1)"),
        ("predictor:Circle", "is defined in a circle"),
        ("predictor:PositionOnly", "takes a by position only"),
        ("predictor:Toy.Absent", "is no class in the source"),
        ("broken:Toy", "has a syntax error (line 1)"),
        ("absent:Toy", "is defined nowhere that the source shows"),
    ],
)
def test_what_the_source_does_not_tell_is_said(site: Path, target: str, reason: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        read(target)
    assert reason in str(caught.value)


def test_our_own_constructors_are_read_as_python_sees_them() -> None:
    import inspect

    from mm_plugin_haar.autoencoder import HaarVideoAutoencoder
    from mm_plugin_wan22.predictor import WanDiT

    for cls in (WanDiT, HaarVideoAutoencoder):
        read_one = read_signature(f"{cls.__module__}:{cls.__name__}")
        assert list(read_one.parameters) == list(inspect.signature(cls).parameters)


def findings(tmp_path: Path, predictor: dict[str, Any], ae: dict[str, Any] | None = None) -> list[Finding]:
    model = {
        "diffusion": {"model_id": "wan_flow_match_scheduler"},
        "predictor": {"init": "random", **predictor},
        "ae": {"model_id": "haar_video"} if ae is None else ae,
        "text_encoder": {"model_id": "UMT5", "init": "random"},
    }
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model, indent=1))
    manager = PluginManager([*sys.path], environ={})
    return [
        finding
        for finding in check_file(str(path), manager=manager)
        if finding.level != "note" or "check" in finding.code
    ]


def test_an_unknown_key_is_an_error_with_the_nearest_argument(site: Path, tmp_path: Path) -> None:
    (found,) = findings(tmp_path, {"model_id": "toy", "in_dim": 24, "outdim": 24})
    assert (found.level, found.code, found.path) == ("error", "unknown-key", "predictor.outdim")
    assert found.message == 'unknown key "outdim" in predictor (toy)'
    assert found.suggestion == 'Did you mean "out_dim"?'
    assert found.line == 9
    assert not {"toy_sig"} & set(sys.modules)


def test_a_missing_argument_is_an_error(site: Path, tmp_path: Path) -> None:
    (found,) = findings(tmp_path, {"model_id": "toy", "out_dim": 24})
    assert (found.code, found.message) == ("missing-key", 'predictor (toy) needs "in_dim"')


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("in_dim", "24", "a whole number"), ("in_dim", True, "a whole number"), ("rate", "x", "a number"),
        ("flag", 1, "true or false"), ("name", 3, "a text in quotes or null"),
        ("in_dim", 24, None), ("rate", 1, None), ("name", None, None), ("flag", True, None), ("shape", [1], None),
    ],
)  # fmt: skip
def test_values_of_plain_types_are_checked(
    site: Path, tmp_path: Path, key: str, value: Any, expected: str | None
) -> None:
    found = findings(tmp_path, {"model_id": "toy", "out_dim": 24, "in_dim": 24, key: value})
    assert [finding.code for finding in found] == ([] if expected is None else ["wrong-type"])
    if expected is not None:
        assert found[0].message.endswith(f"expected {expected}")


def test_a_constructor_that_takes_anything_gives_a_note(site: Path, tmp_path: Path) -> None:
    (found,) = findings(tmp_path, {"model_id": "toy_open", "in_dim": 24, "outdim": 24})
    assert (found.level, found.code) == ("note", "unchecked-key")
    assert found.message == '"outdim" is passed on unchecked: toy_sig.predictor:Open takes any key (**kwargs)'


def test_a_class_made_at_run_time_gives_a_note(site: Path, tmp_path: Path) -> None:
    (found,) = findings(tmp_path, {"model_id": "toy_made", "anything": 1})
    assert (found.level, found.code) == ("note", "unchecked-section")
    assert "is checked when it is built, not here: it has no config class, and" in found.message


def test_a_loader_is_asked_when_it_is_what_is_called(site: Path, tmp_path: Path) -> None:
    ae = {"model_id": "toy_loaded", "from_pretrained": str(tmp_path), "tiling": True, "extra": 2}
    assert not findings(tmp_path, {"model_id": "wandit"}, ae)
    assert [f.code for f in findings(tmp_path, {"model_id": "wandit"}, {**ae, "extr": 2})] == ["unknown-key"]
    built = {"model_id": "toy_loaded", "init": "random", "tiling": True}
    assert [f.code for f in findings(tmp_path, {"model_id": "wandit"}, built)] == [
        "missing-key",
        "unknown-key",
    ]


def test_what_the_program_registered_is_checked_too(tmp_path: Path) -> None:
    from mm_core.config.document import Document
    from mm_core.config.parts import Part, check_part

    def build(in_dim: int, depth: int = 2) -> None: ...

    manager = PluginManager([], environ={})
    manager.register("mm_core.predictor_models", "mine", build)
    document = Document.from_data({"predictor": {"model_id": "mine", "in_dim": 1, "dept": 3}})
    part = Part(
        "predictor", "predictor", ("predictor",), ("predictor", "model_id"), "mine",
        manager.resolve("mm_core.predictor_models", "mine"),
    )  # fmt: skip
    component, found = check_part(part, document, manager)
    assert component is None
    assert [finding.suggestion for finding in found] == ['Did you mean "depth"?']


def test_the_check_imports_no_torch(site: Path, tmp_path: Path) -> None:
    findings(tmp_path, {"model_id": "toy", "in_dim": 24, "out_dim": 24})
    code = (
        "import sys; from mm_core.cli.main import main\n"
        f"code = main(['check', {str(tmp_path / 'model.json')!r}])\n"
        "sys.exit(code or 10 * bool({'torch', 'toy_sig'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(site), "PATH": ""}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
