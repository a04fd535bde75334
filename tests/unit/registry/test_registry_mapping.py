"""`Registry` imports nothing but what is asked for; what the program registers itself. (Its laws as a mapping:
`test_registry_laws.py`.)
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_registry import (
    BrokenPluginError,
    EntrySpec,
    PluginManager,
    Registry,
    RegistryError,
    Status,
    UnknownIdError,
    default_manager,
    reset_default_manager,
)

GROUP = "mm_core.predictor_models"
MODULE = """
import sys
sys.imported_by_test = getattr(sys, "imported_by_test", 0) + 1
class A: pass
class B: pass
"""


@pytest.fixture
def plugin(site: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "imported_by_test", 0, raising=False)
    entries = {GROUP: {"a": "acme_models:A", "b": "acme_models:B", "bad": "acme_bad:Bad"}}
    site.add("acme", entries=entries, modules={"acme_models.py": MODULE, "acme_bad.py": "1/0"})
    return site


def test_questions_import_nothing(plugin: Any, imports: list[str]) -> None:
    registry: Registry[Any] = Registry(GROUP, plugin.manager())
    assert "a" in registry
    assert "acme/a" in registry
    assert "nothing" not in registry
    assert len(registry) == 3
    assert list(registry) == ["a", "b", "bad"]
    assert bool(registry)
    assert repr(registry) == "<Registry mm_core.predictor_models: a, b, bad>"
    assert registry.specs()[0].target == "acme_models:A"
    assert registry.spec("a").distribution == "acme"
    assert registry.get("nothing") is None
    with pytest.raises(UnknownIdError):
        registry["nothing"]
    assert (registry == {}) is False
    assert not [name for name in imports if name.startswith("acme")]


def test_item_imports_its_target_once(plugin: Any, imports: list[str]) -> None:
    registry: Registry[Any] = Registry(GROUP, plugin.manager())
    assert registry["a"] is registry["a"] is registry.get("acme/a")
    assert sys.imported_by_test == 1  # type: ignore[attr-defined]
    assert [name for name in imports if name.startswith("acme")] == ["acme_models"]
    assert registry["a"] is not registry["b"]
    assert sys.imported_by_test == 1  # type: ignore[attr-defined]


def test_get_does_not_hide_a_broken_plugin(plugin: Any) -> None:
    registry: Registry[Any] = Registry(GROUP, plugin.manager())
    assert "bad" in registry
    with pytest.raises(BrokenPluginError):
        registry.get("bad")
    # Known now, and still a key.
    assert {spec.id: spec.status for spec in registry.specs()}["bad"] == "broken"
    assert "bad" in registry


def test_unknown_id_prints_plainly_and_is_a_key_error(plugin: Any) -> None:
    registry: Registry[Any] = Registry(GROUP, plugin.manager())
    with pytest.raises(KeyError) as raised:
        registry["aa"]
    error = raised.value
    assert isinstance(error, UnknownIdError)
    assert str(error) == f"{error.problem}; {error.hint}"
    assert not str(error).startswith(("'", '"'))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.closest, copy.exit_code) == (str(error), error.closest, 2)


def test_key_that_is_no_string(plugin: Any) -> None:
    registry: Registry[Any] = Registry(GROUP, plugin.manager())
    assert 5 not in registry
    assert registry.get(5, "default") == "default"  # type: ignore[call-overload]
    with pytest.raises(UnknownIdError, match="an id is a string, not int"):
        registry[5]  # type: ignore[index]


def test_unknown_group_is_refused(site: Any) -> None:
    with pytest.raises(
        RegistryError, match=r"no group 'mm_core\.predictors'; did you mean 'mm_core\.predictor_models'"
    ):
        len(Registry("mm_core.predictors", site.manager()))


def test_register_as_call_and_as_decorator(plugin: Any) -> None:
    registry: Registry[type] = Registry(GROUP, plugin.manager())

    class Mine:
        pass

    assert registry.register("mine", Mine) is Mine

    @registry.register("other")
    class Other:
        pass

    assert (registry["mine"], registry["other"], registry["runtime/other"]) == (Mine, Other, Other)
    assert len(registry) == 5
    spec = registry.spec("mine")
    assert (spec.distribution, spec.origin, spec.version) == ("runtime", "runtime", "")
    assert spec.target.endswith("Mine")
    registry.register("mine", Mine)  # the same once more changes nothing
    with pytest.raises(RegistryError, match=r"'mine' in mm_core\.predictor_models is registered already"):
        registry.register("mine", Other)
    assert registry["mine"] is Mine
    assert registry.register("mine", Other, replace=True) is registry["mine"] is Other


@pytest.mark.parametrize("id", ["", "a/b", "-a", "a b"])
def test_register_refuses_what_could_not_be_asked_for(plugin: Any, id: str) -> None:
    with pytest.raises(RegistryError, match="is not an id"):
        Registry(GROUP, plugin.manager()).register(id, object)


def test_runtime_claim_contests_an_installed_one_unless_it_replaces_it(plugin: Any) -> None:
    registry: Registry[Any] = Registry(GROUP, plugin.manager())
    registry.register("a", dict)
    with pytest.raises(RegistryError, match=r'offered by acme 1\.0 and runtime; .* "acme/a" or "runtime/a"'):
        registry["a"]
    registry.register("a", dict, replace=True)
    assert registry["a"] is dict
    assert registry["acme/a"].__name__ == "A"
    shown = {spec.distribution: (spec.status, spec.detail) for spec in registry.specs() if spec.id == "a"}
    assert shown == {
        "acme": (
            Status.SHADOWED,
            "the running program replaced it (by register with replace=True); write acme/a to mean this one",
        ),
        "runtime": (Status.AVAILABLE, ""),
    }


def test_temporary_undoes_what_was_registered_in_it(plugin: Any) -> None:
    manager = plugin.manager()
    registry: Registry[Any] = Registry(GROUP, manager)
    other: Registry[Any] = Registry("mm_core.ae_models", manager)
    registry.register("kept", int)

    def use() -> None:
        with registry.temporary() as inside:
            assert inside is registry
            registry.register("gone", str)
            registry.register("kept", float, replace=True)
            registry.register("a", dict, replace=True)
            other.register("other", bytes)
            assert (registry["gone"], registry["kept"], registry["a"]) == (str, float, dict)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert "gone" not in registry
    assert registry["kept"] is int
    assert registry["a"].__name__ == "A"
    assert other["other"] is bytes
    gone = EntrySpec("gone", GROUP, "builtins:str", "runtime", "", "")
    with pytest.raises(RegistryError, match="is no longer"):
        manager.load(gone)


def test_default_manager_is_one_and_can_be_forgotten(make_site: Callable[..., Any]) -> None:
    registry: Registry[Any] = Registry(GROUP)
    first = default_manager()
    assert first is default_manager() is registry.manager
    try:
        site = make_site()
        site.add("acme-fresh", entries={GROUP: {"fresh_for_test": "acme_fresh:A"}})
        reset_default_manager()
        assert default_manager() is not first
        assert "fresh_for_test" in registry
    finally:
        reset_default_manager()


def test_default_manager_sees_what_this_environment_has() -> None:
    """The installed distributions of this repository, whatever way they were installed."""
    registry: Registry[Any] = Registry("mm_core.tasks", PluginManager(environ={}))
    spec = registry.spec("diffusion")
    assert spec.distribution == "mmzoo-core"
    assert Path(spec.path).is_dir()
    assert spec.required_api == ("mmzoo-registry>=0.1,<0.2",)
