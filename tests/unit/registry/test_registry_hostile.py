"""Files and plugins that mean harm, or are merely odd: each ends in one clear sentence, none stops the others."""

from __future__ import annotations

import builtins
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_registry import BrokenPluginError, HookError, PluginManager, Registry, SelectionError, UserError
from mm_registry.hooks import ConfigPatch, collect_patches
from mm_registry.lock import LockError, changed_files, current_lock, read_lock, require_lock, write_lock
from mm_registry.words import described, shown, visible

GROUP, FAREWELLS, HOOKS = "mm_core.predictor_models", "mm_core.farewells", "mm_core.hooks"
Site = Any  # of conftest.py
ESCAPE = "\x1b[31m"
MODULE = {"ma.py": "class X: pass\n"}


def plain(site: Site, name: str = "plug-a", **more: Any) -> Path:
    return site.add(name, entries={GROUP: {"x": "ma:X"}}, modules=MODULE, **more)


def said(manager: PluginManager) -> str:
    return "\n".join(str(diagnostic) for diagnostic in manager.discover().diagnostics)


# Selection files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbf[plugins]\n", "mmzoo.toml:1: the file starts with a byte order mark"),
        (b"[plugins]\nallow = " + b"[" * 5000, "cannot be read as TOML: RecursionError"),
        (b"[plugins]\nallow = " + b"9" * 5000, "cannot be read as TOML: ValueError"),
        (b"#" * (1 << 20) + b"\n", "larger than 1 MiB"),
        (b"# \xe2\x80\xa8\n[plugins]\nallow = [1]\n", "mmzoo.toml:3: "),
        (b'[plugins]\ndisable = ["runtime"]\n', "registers itself and cannot be disabled"),
        (b'[plugins]\nallow = "' + b"x" * 9000 + b'"\n', "expected a list of distributions"),
        (b'[plugins]\n"\\u001b[31m" = 1\n', "is no key of a selection"),
    ],
)
def test_an_odd_selection_file(content: bytes, expected: str, site: Site, tmp_path: Path) -> None:
    (tmp_path / "mmzoo.toml").write_bytes(content)
    manager = PluginManager([], environ={}, environment_file=None, project_folder=tmp_path)
    with pytest.raises(SelectionError) as error:
        manager.discover()
    assert expected in str(error.value)
    assert len(str(error.value)) < 600
    assert str(error.value).isprintable()


@pytest.mark.parametrize("make", ["dangling", "folder", "pipe"])
def test_a_selection_file_that_cannot_be_read_is_not_passed_over(make: str, tmp_path: Path) -> None:
    file = tmp_path / "mmzoo.toml"
    {"dangling": lambda: file.symlink_to("nowhere"), "folder": file.mkdir, "pipe": lambda: os.mkfifo(file)}[
        make
    ]()
    for places in (
        {"environment_file": file, "project_folder": None},
        {"environment_file": None, "project_folder": tmp_path},
    ):
        with pytest.raises(SelectionError, match=r"mmzoo\.toml: the file cannot be read: "):
            PluginManager([], environ={}, **places).discover()


def test_a_huge_variable_is_shortened(site: Site) -> None:
    plain(site)
    with pytest.raises(UserError, match="does not list plug-a; add ,plug-a to it") as error:
        site.manager(MM_PLUGINS="y" * 100_000).resolve(GROUP, "x")
    assert len(str(error.value)) < 600


# Metadata


@pytest.mark.parametrize("name", ["runtime", "Runtime"])
def test_no_distribution_passes_for_the_running_program(name: str, site: Site) -> None:
    plain(site, name)
    manager = site.manager(MM_PLUGINS="")
    assert manager.ids(GROUP) == ()
    assert f"the name {name!r} is reserved" in said(manager)
    manager.register(GROUP, "x", int, replace=True)
    assert manager.load(manager.resolve(GROUP, "x")) is int


@pytest.mark.parametrize(
    "requires",
    [
        "mmzoo-core>=" + "9" * 5000,
        "mmzoo-core; " + "(" * 3000 + "python_version > '3'" + ")" * 3000,
        'mmzoo-core; "x" in extras',
        'mmzoo-core; os_name ~= "x"',
    ],
)
def test_a_requirement_that_defeats_packaging_stops_nobody(requires: str, site: Site) -> None:
    plain(site, requires=[requires])
    site.add(
        "plug-b", entries={GROUP: {"y": "ma:X [e]"}}, requires=[requires, f"{requires} and extra == 'e'"]
    )
    site.add("mmzoo-core", entries={GROUP: {"z": "ma:X"}})
    assert site.manager().ids(GROUP) == ("x", "y", "z")


def test_a_version_of_thousands_of_digits_stops_nobody(site: Site) -> None:
    plain(site, requires=["mmzoo-core>=0.1,<0.2"])
    info = site.add("mmzoo-core")
    (info / "METADATA").write_text(f"Name: mmzoo-core\nVersion: {'9' * 5000}\n")
    assert site.manager().resolve(GROUP, "x").distribution == "plug-a"


def test_a_farewell_is_parsed_in_linear_time(site: Site) -> None:
    """A pattern that backtracks would not come to an end."""
    plain(site)
    values = {"predictor/o": "v1" + "a" * 5000 + "!", "predictor/p": "v1_2rc1", "predictor/q": "2_0_post1"}
    site.add("plug-b", entries={FAREWELLS: values})
    found = {spec.id: spec.target for spec in site.manager().specs(FAREWELLS) if spec.status == "available"}
    assert found == {"predictor/p": "1.2rc1", "predictor/q": "2.0.post1"}


@pytest.mark.parametrize("field", ["Name", "Version"])
@pytest.mark.parametrize("value", [ESCAPE, "x" * 300, "a\u202eb"])
def test_names_and_versions_that_none_can_have(field: str, value: str, site: Site) -> None:
    fields = {"Name": "plug-b", "Version": "1.0", field: value}
    (site.add("plug-b", entries={GROUP: {"y": "mb:Y"}}) / "METADATA").write_text(
        "".join(f"{key}: {text}\n" for key, text in fields.items()), encoding="utf-8"
    )
    plain(site)
    manager = site.manager()
    assert manager.ids(GROUP) == ("x",)
    assert f"its {field} " in said(manager)
    assert said(manager).isprintable()


def test_an_id_has_a_greatest_length(site: Site) -> None:
    site.add("plug-a", entries={GROUP: {"x" * 201: "ma:X", "y" * 200: "ma:X"}})
    manager = site.manager()
    assert manager.ids(GROUP) == ("y" * 200,)
    assert len(said(manager)) < 300


# Imports


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "class E(Exception):\n  def __str__(self): raise self\nraise E()",
            "E (whose message cannot be read)",
        ),
        ("raise RuntimeError('\\x1b[2J' * 999)", "RuntimeError: "),
        ("def __dir__(): raise RuntimeError", "ma has no 'X'"),
        ("def __dir__(): return [5, None]", "ma has no 'X'"),
        ("def __getattr__(name): raise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_a_module_that_misbehaves(source: str, expected: str, site: Site) -> None:
    site.add("plug-a", entries={GROUP: {"x": "ma:X"}}, modules={"ma.py": source})
    with pytest.raises(BrokenPluginError) as error:
        Registry[Any](GROUP, site.manager())["x"]
    assert expected in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_a_module_that_asks_for_itself_too_early_is_not_broken(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import builtins\ntry:\n    builtins.asked['x']\nexcept Exception as e:\n    builtins.told = str(e)\nclass X: pass\n"
    site.add("plug-a", entries={GROUP: {"x": "ma:X"}}, modules={"ma.py": source})
    registry = Registry[Any](GROUP, site.manager())
    monkeypatch.setattr(builtins, "asked", registry, raising=False)
    monkeypatch.setattr(builtins, "told", "", raising=False)
    assert registry["x"] is registry["x"]
    assert "while its module is still being imported; ask for it later" in builtins.told  # type: ignore[attr-defined]
    assert registry.spec("x").status == "available"


# Hooks


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def __dir__(): raise RuntimeError('no')", "cannot be used: RuntimeError: no"),
        (
            "class E(Exception):\n  def __str__(self): raise self\n@hookimpl\ndef overwrite_config(role): raise E()",
            "raised for",
        ),
        (
            "@hookimpl\ndef overwrite_config(role): return ConfigPatch({'a': object()}, 'r')",
            "a JSON file could hold",
        ),
        (
            "@hookimpl\ndef overwrite_config(role): return ConfigPatch({'\\x1b': 1}, 'r')",
            "is not a dotted path",
        ),
    ],
)
def test_a_hooks_module_that_misbehaves(source: str, expected: str, site: Site) -> None:
    head = "from mm_registry.hooks import ConfigPatch, hookimpl\n"
    site.add("plug-a", entries={HOOKS: {"h": "mh"}}, modules={"mh.py": head + source})
    with pytest.raises(HookError, match=r"plug-a 1\.0") as error:
        collect_patches(site.manager().activate(["plug-a"]), "predictor", "x", {})
    assert expected in str(error.value)


def test_a_patch_holds_what_json_can_hold() -> None:
    assert ConfigPatch({"a.b": [1, {"c": None}]}, "r").changes == {"a.b": [1, {"c": None}]}
    with pytest.raises(ValueError, match="'a'"):
        ConfigPatch({"a": threading.Lock()}, "r")


# The lock


@pytest.mark.parametrize("path", [".", "/", "..", "no/x.lock", "file/x.lock", "x" * 300, "folder", "pipe"])
def test_a_place_that_cannot_hold_a_lock(
    path: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(site)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(LockError, match="the lock file cannot be written"):
        write_lock(Path(path), current_lock(site.manager()))
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_to_a_lock_stays_one(site: Site, tmp_path: Path) -> None:
    plain(site)
    (tmp_path / "a.lock").symlink_to("b.lock")
    write_lock(tmp_path / "a.lock", current_lock(site.manager()))
    assert (tmp_path / "a.lock").is_symlink()
    require_lock(tmp_path / "b.lock", site.manager())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["distributions"][0].update(editable="false"), "'false' is not of type bool"),
        (lambda d: d["distributions"][0].update(name=ESCAPE), "cannot be printed"),
        (lambda d: d["distributions"][0].update(version="9" * 9999), "is too long"),
        (lambda d: d["distributions"].append(d["distributions"][0]), "names a distribution twice"),
        (lambda d: d.update(format="x" * 9999), "and this version reads 1"),
    ],
)
def test_a_lock_that_was_tampered_with(
    change: Callable[[Any], None], expected: str, site: Site, tmp_path: Path
) -> None:
    plain(site)
    path = tmp_path / "mmzoo.lock"
    write_lock(path, current_lock(site.manager()))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(LockError, match="is no lock file") as error:
        read_lock(path)
    assert expected in str(error.value)
    assert len(str(error.value)) < 600


def test_commands_from_a_lock_are_quoted_and_few(site: Site, tmp_path: Path) -> None:
    plain(site)
    path = tmp_path / "mmzoo.lock"
    write_lock(path, current_lock(site.manager()))
    content = json.loads(path.read_text())
    first = content["distributions"][0]
    content["distributions"] = [{**first, "name": f"n{i}", "version": "1'; rm -rf ~"} for i in range(50)]
    path.write_text(json.dumps(content))
    with pytest.raises(LockError) as error:
        require_lock(path, site.manager())
    assert """pip install 'n0==1'"'"'; rm -rf ~'""" in str(error.value)
    assert "… and 31 more" in str(error.value)
    assert len(error.value.drift) == 51


def test_what_cannot_be_read_through_is_not_read(site: Site, tmp_path: Path) -> None:
    """A pipe in a source tree, and one that RECORD names, would be waited for without end."""
    package = tmp_path / "source" / "hostile_me"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    os.mkfifo(package / "pipe")
    direct_url = {"url": (tmp_path / "source").as_uri(), "dir_info": {"editable": True}}
    site.add("plug-e", entries={GROUP: {"e": "hostile_me:X"}}, direct_url=direct_url)
    os.mkfifo(tmp_path / "pipe")
    record = f"{tmp_path}/pipe,sha256=a,1\nma.py\0,sha256=a,1\n"
    (plain(site) / "RECORD").write_text(record)
    (plain(site, "plug-b") / "RECORD").write_text('"' + "x" * 200_000)  # more than csv reads of one field
    manager = site.manager()
    assert set(current_lock(manager).distributions) == {"plug-a", "plug-b", "plug-e"}
    assert [drift.kind for drift in changed_files(manager)] == ["file", "file"]


def test_a_lock_of_odd_entries_can_be_read_again(site: Site, tmp_path: Path) -> None:
    site.add("plug-a", entries={GROUP: {"x": f"ma{ESCAPE}:X"}})
    write_lock(tmp_path / "a.lock", current_lock(site.manager()))
    require_lock(tmp_path / "a.lock", site.manager())


# Words


def test_words() -> None:
    assert visible("a\nb é\x1b\udcff\u202e") == "a\nb é\\x1b\\udcff\\u202e"
    assert shown("x" * 100, 5) == "'xxx…"
    assert described(ValueError("a\n b")) == "ValueError: a b"
    assert described(KeyError()) == "KeyError"
    assert str(UserError(f"a{ESCAPE}\nb")) == "a\\x1b[31m\nb"
