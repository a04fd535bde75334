"""Hooks: only of the distributions in use, each patch with its author, each mistake with its owner."""

from __future__ import annotations

import sys
from typing import Any

import pluggy
import pytest

from mm_registry import (
    BrokenPluginError,
    ConfigPatch,
    HookError,
    UnavailablePluginError,
    collect_patches,
    run_post_build,
)

HOOKS = "mm_core.hooks"

PATCH = """
from mm_registry.hooks import ConfigPatch, hookimpl

@hookimpl{options}
def overwrite_config(role, config):
    return ConfigPatch({{"{key}": len(config)}}, reason="because")
"""
FAILING = """
from mm_registry import hookimpl

@hookimpl
def overwrite_config(role, model_id, config):
    raise ValueError("no such\\nlayer")

@hookimpl
def post_build(model):
    model["built"].append("failing")
    raise RuntimeError("cannot adjust")
"""


def add(site: Any, name: str, source: str, version: str = "1.0") -> None:
    module = f"{name}_hooks_for_test"
    site.add(name, version, {HOOKS: {"hooks": module}}, modules={f"{module}.py": source})


def test_only_named_distributions_are_imported_and_called(site: Any, imports: list[str]) -> None:
    add(site, "acme", PATCH.format(key="depth", options=""), "1.5")
    add(site, "beta", FAILING)
    hooks = site.manager().activate(["Acme"])
    assert isinstance(hooks, pluggy.PluginManager)
    (patch,) = collect_patches(hooks, "predictor", "a", {"x": 1})
    assert patch == ("acme", "1.5", ConfigPatch({"depth": 1}, reason="because"))
    distribution, version, change = patch
    assert (distribution, version, change.required) == ("acme", "1.5", False)
    assert "beta_hooks_for_test" not in imports


def test_nothing_active_changes_nothing(site: Any) -> None:
    site.add("acme", entries={"mm_core.ae_models": {"a": "acme:A"}})
    hooks = site.manager().activate(["acme", "runtime"])
    assert collect_patches(hooks, "predictor", "a", {}) == []
    run_post_build(hooks, "predictor", "a", object())


def test_order_is_by_distribution_unless_a_hook_asks_for_more(site: Any) -> None:
    add(site, "zeta", PATCH.format(key="z", options="(tryfirst=True)"))
    add(site, "acme", PATCH.format(key="a", options=""))
    add(site, "mid", PATCH.format(key="m", options=""))
    patches = collect_patches(site.manager().activate(["mid", "zeta", "acme"]), "predictor", "a", {})
    assert [patch.distribution for patch in patches] == ["zeta", "acme", "mid"]


def test_hook_sees_a_copy_of_the_section(site: Any) -> None:
    source = PATCH.format(key="depth", options="").replace(
        "    return", "    config['nested'].clear()\n    return"
    )
    add(site, "acme", source)
    add(site, "beta", source)
    section = {"nested": {"kept": True}}
    assert len(collect_patches(site.manager().activate(["acme", "beta"]), "predictor", "a", section)) == 2
    assert section == {"nested": {"kept": True}}


def test_post_build_runs_in_order_on_the_model(site: Any) -> None:
    source = "from mm_registry import hookimpl\n@hookimpl\ndef post_build(model):\n    model.append({!r})\n"
    for name in ("beta", "acme"):
        add(site, name, source.format(name))
    model: list[str] = []
    run_post_build(site.manager().activate(["acme", "beta"]), "predictor", "a", model)
    assert model == ["acme", "beta"]


def test_exception_names_distribution_version_and_hook(site: Any) -> None:
    add(site, "beta", FAILING, "3.1")
    hooks = site.manager().activate(["beta"])
    with pytest.raises(HookError) as raised:
        collect_patches(hooks, "predictor", "wandit", {})
    error = raised.value
    assert str(error) == (
        "the hook overwrite_config of beta 3.1 (beta_hooks_for_test) raised for predictor 'wandit': "
        "ValueError: no such layer"
    )
    assert (error.distribution, error.version, error.hook) == ("beta", "3.1", "overwrite_config")
    assert isinstance(error.__cause__, ValueError)
    model: dict[str, list[str]] = {"built": []}
    with pytest.raises(HookError, match=r"post_build of beta 3\.1 .* RuntimeError: cannot adjust"):
        run_post_build(hooks, "ae", "a", model)
    assert model["built"] == ["failing"]


def test_hook_that_exits_does_not_end_the_command(site: Any) -> None:
    add(
        site,
        "acme",
        "from mm_registry import hookimpl\n@hookimpl\ndef overwrite_config():\n    raise SystemExit(0)\n",
    )
    with pytest.raises(HookError, match=r"of acme 1\.0 .* raised for ae 'x': SystemExit: 0"):
        collect_patches(site.manager().activate(["acme"]), "ae", "x", {})


def test_result_that_is_no_patch(site: Any) -> None:
    add(
        site,
        "acme",
        "from mm_registry import hookimpl\n@hookimpl\ndef overwrite_config():\n    return {'depth': 3}\n",
    )
    with pytest.raises(
        HookError, match=r"of acme 1\.0 returned a dict for ae 'x'; it must return a ConfigPatch or None"
    ):
        collect_patches(site.manager().activate(["acme"]), "ae", "x", {})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "@hookimpl\ndef overwrite_confg(config): ...",
            "acme 1.0 implements the hook 'overwrite_confg' (acme_hooks_for_test), which does not exist; "
            "did it mean 'overwrite_config'?",
        ),
        ("@hookimpl\ndef zzz(): ...", "which does not exist; the hooks are overwrite_config, post_build"),
        (
            "@hookimpl\ndef overwrite_config(cfg): ...",
            "the hooks of acme 1.0 (acme_hooks_for_test) cannot be used",
        ),
        ("def overwrite_config(config): ...", "has no function marked with @mm_registry.hooks.hookimpl"),
        ("@hookimpl(wrapper=True)\ndef post_build(model):\n    yield", "post_build of acme 1.0 is a wrapper"),
    ],
)
def test_misdeclared_hook_is_an_error_at_activation(site: Any, source: str, said: str) -> None:
    add(site, "acme", f"from mm_registry import hookimpl\n{source}\n")
    with pytest.raises(HookError) as raised:
        site.manager().activate(["acme"])
    assert said in str(raised.value)
    assert raised.value.distribution == "acme"


def test_hooks_module_that_cannot_be_imported(site: Any) -> None:
    add(site, "acme", "import decoder_not_there")
    with pytest.raises(
        BrokenPluginError, match=r"the hooks module 'hooks' of acme 1\.0 is broken: .* 'decoder_not_there'"
    ):
        site.manager().activate(["acme"])


def test_distribution_that_is_not_installed_or_blocked(site: Any) -> None:
    add(site, "acme", FAILING)
    with pytest.raises(UnavailablePluginError, match=r"'acne' is not installed; did you mean 'acme'\?"):
        site.manager().activate(["acne"])
    with pytest.raises(
        UnavailablePluginError, match=r"the hooks of acme 1\.0 cannot be used: .* does not list acme"
    ):
        site.manager(MM_PLUGINS="other").activate(["acme"])
    site.add("plain-library", "3.0")
    with pytest.raises(
        UnavailablePluginError, match="distribution 'plain_library' declares no entry point of MM Zoo"
    ):
        site.manager().activate(["plain_library"])
    site.add("mmzoo-core", "0.1.0")
    assert not site.manager().activate(["mmzoo-core"]).sources
    assert "acme_hooks_for_test" not in sys.modules


def test_hooks_of_the_same_entry_name_do_not_collide(site: Any) -> None:
    add(site, "acme", PATCH.format(key="a", options=""))
    add(site, "beta", PATCH.format(key="b", options=""))
    manager = site.manager()
    assert {spec.status for spec in manager.specs(HOOKS)} == {"available"}
    assert len(collect_patches(manager.activate(["acme", "beta"]), "ae", "x", {})) == 2


def test_config_patch_checks_itself() -> None:
    changes = {"rope.theta": 1.0}
    patch = ConfigPatch(changes, "why")
    changes["depth"] = 2.0
    assert patch.changes == {"rope.theta": 1.0}
    for bad in ({"": 1}, {"a..b": 1}, {".a": 1}, {3: 1}):
        with pytest.raises(ValueError, match="is not a dotted path"):
            ConfigPatch(bad, "why")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the reason is empty"):
        ConfigPatch({"a": 1}, " ")
