"""Imports that fail say what is missing, and whose it is."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mm_registry import BrokenPluginError, Status

GROUP = "mm_core.predictor_models"
SEE = "; run `mm plugin check acme --import` for the traceback"


def load(site: Any, target: str, modules: dict[str, str]) -> BrokenPluginError:
    site.add("acme", "1.0", {GROUP: {"a": target}}, modules=modules)
    manager = site.manager()
    spec = manager.resolve(GROUP, "a")
    with pytest.raises(BrokenPluginError) as raised:
        manager.load(spec)
    error = raised.value
    assert str(error).startswith("the predictor 'a' of acme 1.0 is broken: ")
    assert error.spec is not None
    assert (error.spec.status, error.spec.distribution) == (Status.BROKEN, "acme")
    assert error.__cause__ is not None
    return error


@pytest.mark.parametrize(
    ("modules", "missing"),
    [
        ({}, "acme_gone"),
        ({"acme_gone/__init__.py": ""}, "acme_gone.models"),
    ],
)
def test_target_module_is_missing(site: Any, modules: dict[str, str], missing: str) -> None:
    error = load(site, "acme_gone.models:A", modules)
    assert str(error) == (
        f"the predictor 'a' of acme 1.0 is broken: its target acme_gone.models:A is missing: "
        f"there is no module {missing!r}; reinstall acme, or report it to its authors{SEE}"
    )
    assert isinstance(error.__cause__, ModuleNotFoundError)


def test_dependency_is_missing(site: Any) -> None:
    modules = {"acme_dep/__init__.py": "", "acme_dep/models.py": "import decoder_not_there.fast"}
    assert str(load(site, "acme_dep.models:A", modules)) == (
        "the predictor 'a' of acme 1.0 is broken: its target acme_dep.models:A needs the module "
        "'decoder_not_there', which is not installed; "
        f"install the distribution that provides it, into this environment{SEE}"
    )


def test_own_submodule_is_missing(site: Any) -> None:
    modules = {"acme_sub/__init__.py": "", "acme_sub/models.py": "from acme_sub.layers import Layer"}
    assert str(load(site, "acme_sub.models:A", modules)) == (
        "the predictor 'a' of acme 1.0 is broken: its target acme_sub.models:A needs its own module "
        f"'acme_sub.layers', which is missing; reinstall acme{SEE}"
    )


def test_object_is_missing(site: Any) -> None:
    error = load(site, "acme_attr:WanDTi", {"acme_attr.py": "class WanDiT: pass"})
    assert str(error) == (
        "the predictor 'a' of acme 1.0 is broken: its target acme_attr:WanDTi is missing: "
        f"acme_attr has no 'WanDTi'; did it mean 'WanDiT'?{SEE}"
    )
    assert isinstance(error.__cause__, AttributeError)


def test_inner_object_is_missing(site: Any) -> None:
    error = load(site, "acme_inner:Outer.Inner", {"acme_inner.py": "class Outer: pass"})
    assert "Outer has no 'Inner'" in str(error)


def test_attribute_of_an_object_without_a_dictionary(site: Any) -> None:
    error = load(site, "acme_slots:number.inner", {"acme_slots.py": "number = 7"})
    assert "int has no 'inner'" in str(error)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero ("),
        ("def broken(:\n", "raised SyntaxError: invalid syntax (acme_raises.py, line 1)"),
        ("raise SystemExit(3)", "raised SystemExit: 3 ("),
        ("from json import nonsense", "raised ImportError: cannot import name 'nonsense' from 'json'"),
        ("class E(Exception):\n    pass\nraise E", "raised E ("),
        ("raise RuntimeError('long ' * 1000)", "raised RuntimeError: long long"),
    ],
)
def test_import_raises(site: Any, source: str, said: str) -> None:
    message = str(load(site, "acme_raises:A", {"acme_raises.py": source}))
    assert f"importing its target acme_raises:A {said}" in message
    assert len(message) < 1000
    assert message.endswith(SEE)
    if "SyntaxError" not in said:
        assert "acme_raises.py:" in message


def test_lazy_attribute_that_raises(site: Any) -> None:
    source = "def __getattr__(name):\n    import decoder_not_there"
    assert "needs the module 'decoder_not_there'" in str(load(site, "acme_lazy:A", {"acme_lazy.py": source}))


def test_failure_is_remembered_and_not_retried(site: Any) -> None:
    site.add(
        "acme", "1.0", {GROUP: {"a": "acme_late:A", "b": "acme_late:B"}}, modules={"acme_late.py": "1/0"}
    )
    manager = site.manager()
    spec = manager.resolve(GROUP, "a")
    with pytest.raises(BrokenPluginError) as first:
        manager.load(spec)
    (site.root / "acme_late.py").write_text("A = B = 1")
    with pytest.raises(BrokenPluginError) as second:
        manager.load(spec)
    with pytest.raises(BrokenPluginError) as third:
        manager.resolve(GROUP, "a")
    assert str(first.value) == str(second.value) == str(third.value)
    assert first.value.__cause__ is second.value.__cause__ is third.value.__cause__
    shown = {spec.id: (spec.status, spec.detail) for spec in manager.specs(GROUP)}
    assert shown["a"][0] is Status.BROKEN
    assert "ZeroDivisionError" in shown["a"][1]
    assert shown["b"] == (Status.AVAILABLE, "")
    broken = {spec.id for spec in manager.discover().entries if spec.status is Status.BROKEN}
    assert broken == {"a"}


def test_interrupt_is_no_broken_plugin(site: Any) -> None:
    site.add(
        "acme", entries={GROUP: {"a": "acme_ctrl_c:A"}}, modules={"acme_ctrl_c.py": "raise KeyboardInterrupt"}
    )
    manager = site.manager()
    with pytest.raises(KeyboardInterrupt):
        manager.load(manager.resolve(GROUP, "a"))


@pytest.mark.timeout(30)
def test_module_that_registers_while_two_threads_want_it(site: Any) -> None:
    """The lock of an import and the manager's own must not wait for each other."""
    source = """
import time, acme_shared
time.sleep(0.1)
acme_shared.manager.register("mm_core.tasks", "mine", dict)
class A: pass
"""
    site.add(
        "acme",
        entries={GROUP: {"a": "acme_thread:A"}},
        modules={"acme_thread.py": source, "acme_shared.py": "manager = None"},
    )
    manager = site.manager()
    import acme_shared

    acme_shared.manager = manager
    spec = manager.resolve(GROUP, "a")
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(manager.load(spec))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(results) == 2
    assert results[0] is results[1]
    assert manager.offers("mm_core.tasks", "mine")
