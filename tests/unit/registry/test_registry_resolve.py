"""Which entry an id means: collisions, availability, companions of a component."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from mm_registry import (
    AmbiguousIdError,
    BrokenPluginError,
    PluginManager,
    RegistryError,
    Status,
    UnavailablePluginError,
    UnknownIdError,
    UserError,
)

GROUP = "mm_core.predictor_models"
CONFIGS = "mm_core.configs"


def test_collision_is_an_error_only_for_the_contested_id(site: Any) -> None:
    site.add("acme", "1.0", {GROUP: {"shared": "a:A", "own": "a:B"}})
    site.add("beta", "2.0", {GROUP: {"shared": "b:A"}})
    manager = site.manager()
    assert manager.resolve(GROUP, "own").distribution == "acme"
    with pytest.raises(AmbiguousIdError) as raised:
        manager.resolve(GROUP, "shared")
    assert str(raised.value) == (
        "the predictor 'shared' is offered by acme 1.0 and beta 2.0; write the one that you mean under "
        'predictor.model_id: "acme/shared" or "beta/shared", or put "predictor/shared" = "acme" (or "beta") '
        "under [plugins.prefer] in mmzoo.toml"
    )
    assert [spec.distribution for spec in raised.value.specs] == ["acme", "beta"]
    assert not isinstance(raised.value, KeyError)
    for qualified in ("beta/shared", "Beta/shared"):
        spec = manager.resolve(GROUP, qualified)
        assert (spec.distribution, spec.target, spec.status) == ("beta", "b:A", Status.AVAILABLE)
    assert manager.resolve(GROUP, "shared", "acme").target == "a:A"
    shown = {(spec.id, spec.distribution): (spec.status, spec.detail) for spec in manager.specs(GROUP)}
    assert shown["shared", "acme"] == (
        Status.AMBIGUOUS,
        "beta 2.0 claims it too; write acme/shared to mean this one",
    )
    assert shown["own", "acme"] == (Status.AVAILABLE, "")


def test_contested_claim_chosen_by_hand_can_be_loaded(site: Any) -> None:
    site.add("acme", entries={GROUP: {"shared": "acme_hand:A"}}, modules={"acme_hand.py": "A = 'acme'"})
    site.add("beta", entries={GROUP: {"shared": "beta_hand:A"}}, modules={"beta_hand.py": "A = 'beta'"})
    manager = site.manager()
    assert [manager.load(spec) for spec in manager.specs(GROUP)] == ["acme", "beta"]


def test_message_of_a_collision_is_the_same_in_every_order(make_site: Callable[..., Any]) -> None:
    places = [make_site(name) for name in ("one", "two", "three")]
    for place, (name, version) in zip(places, [("zeta", "1"), ("acme", "2"), ("mid", "3")], strict=True):
        place.add(name, version, {GROUP: {"shared": f"{name}:A"}})
    messages = set()
    for order in itertools.permutations(places):
        with pytest.raises(AmbiguousIdError) as raised:
            PluginManager([str(place.root) for place in order], environ={}).resolve(GROUP, "shared")
        messages.add(str(raised.value))
    assert len(messages) == 1
    assert "acme 2 and mid 3 and zeta 1" in messages.pop()


def test_allowlist_settles_a_collision(site: Any) -> None:
    site.add("acme", entries={GROUP: {"shared": "a:A"}})
    site.add("beta", entries={GROUP: {"shared": "b:A"}})
    assert site.manager(MM_PLUGINS="beta").resolve(GROUP, "shared").distribution == "beta"


def test_unusable_claim_still_contests(site: Any) -> None:
    """Otherwise upgrading an unrelated distribution would silently change what an id means."""
    site.add("mmzoo-core", "0.1.0")
    site.add("acme", entries={GROUP: {"shared": "a:A"}})
    site.add("beta", entries={GROUP: {"shared": "b:A"}}, requires=["mmzoo-core>=9"])
    with pytest.raises(AmbiguousIdError):
        site.manager().resolve(GROUP, "shared")


@pytest.mark.parametrize("setting", ["other", "", " , "])
def test_blocked_distribution(site: Any, setting: str, imports: list[str]) -> None:
    site.add("acme", "1.0", {GROUP: {"a": "acme:A"}})
    site.add("mmzoo-core", "0.1.0", {GROUP: {"core": "core:A"}})
    manager = site.manager(MM_PLUGINS=setting)
    assert manager.resolve(GROUP, "core").distribution == "mmzoo-core"
    with pytest.raises(UnavailablePluginError) as raised:
        manager.resolve(GROUP, "a")
    wanted = "other,acme" if setting == "other" else "acme"
    assert str(raised.value) == (
        f"the predictor 'a' of acme 1.0 cannot be used: MM_PLUGINS={setting.strip()!r} does not list acme; "
        f"set MM_PLUGINS={wanted!r}, or unset it"
    )
    spec = next(spec for spec in manager.specs(GROUP) if spec.id == "a")
    assert spec.status is Status.NOT_ALLOWLISTED
    with pytest.raises(UnavailablePluginError):
        manager.load(spec)
    assert "acme" not in imports


def test_allowlist_takes_any_spelling_and_names_what_is_not_installed(site: Any) -> None:
    site.add("mmzoo-plugin-acme", entries={GROUP: {"a": "acme:A"}})
    site.add("plain-library")
    manager = site.manager(MM_PLUGINS=" MMZoo_Plugin.Acme ,mmzoo-plugin-acne,plain-library")
    assert manager.resolve(GROUP, "a").status is Status.AVAILABLE
    (diagnostic,) = manager.discover().diagnostics
    assert diagnostic.message == (
        "MM_PLUGINS lists 'mmzoo-plugin-acne', which is not installed; did you mean 'mmzoo-plugin-acme'?"
    )


def test_allowlist_of_the_process(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("acme", entries={GROUP: {"a": "acme:A"}})
    monkeypatch.setenv("MM_PLUGINS", "other")
    assert PluginManager([str(site.root)]).specs(GROUP)[0].status is Status.NOT_ALLOWLISTED
    monkeypatch.delenv("MM_PLUGINS")
    assert PluginManager([str(site.root)]).specs(GROUP)[0].status is Status.AVAILABLE


@pytest.mark.parametrize(
    ("range_", "installed", "fits"),
    [
        (">=0.1,<0.2", "0.1.5", True),
        (">=0.1,<0.2", "0.2.0", False),
        (">=0.2", "0.1.9", False),
        (">=0.1", "0.2.0.dev1", True),
        ("", "7", True),
        (">=0.1,<0.2 ; python_version < '3'", "0.9", True),
    ],
)
def test_api_range(site: Any, range_: str, installed: str, fits: bool) -> None:
    site.add("mmzoo-core", installed)
    site.add("acme", "1.0", {GROUP: {"a": "acme:A"}}, requires=[f"mmzoo-core{range_}", "not ! a requirement"])
    manager = site.manager()
    assert manager.discover().diagnostics == ()
    if fits:
        assert manager.resolve(GROUP, "a").status is Status.AVAILABLE
        return
    assert manager.specs(GROUP)[0].status is Status.INCOMPATIBLE
    with pytest.raises(UnavailablePluginError) as raised:
        manager.resolve(GROUP, "a")
    assert str(raised.value) == (
        f"the predictor 'a' of acme 1.0 cannot be used: it needs mmzoo-core {range_} and {installed} "
        f"is installed; install a version made for mmzoo-core {installed}, or mmzoo-core in that range"
    )


def test_api_range_that_cannot_be_read(site: Any) -> None:
    site.add("acme", entries={GROUP: {"a": "acme:A"}}, requires=["mmzoo-core>=zero"])
    report = site.manager().discover()
    assert report.entries[0].status is Status.AVAILABLE
    assert "the requirement 'mmzoo-core>=zero' cannot be parsed" in report.diagnostics[0].message


def test_extras_are_checked_without_import(site: Any) -> None:
    requires = ["numpy", "decoder>=2; extra == 'video'", "colours; extra == 'other'"]
    site.add("acme", "1.0", {GROUP: {"a": "acme:A [video]"}}, requires=requires)
    with pytest.raises(UnavailablePluginError) as raised:
        site.manager().resolve(GROUP, "a")
    assert str(raised.value) == (
        "the predictor 'a' of acme 1.0 cannot be used: it needs decoder>=2; run: pip install 'acme[video]'"
    )
    decoder = site.add("decoder", "1.9")
    assert site.manager().specs(GROUP)[0].status is Status.MISSING_EXTRA
    decoder.rename(decoder.with_name("decoder-2.1.dist-info"))
    (site.root / "decoder-2.1.dist-info" / "METADATA").write_text("Name: decoder\nVersion: 2.1\n")
    spec = site.manager().resolve(GROUP, "a")
    assert (spec.status, spec.extras, spec.target) == (Status.AVAILABLE, ("video",), "acme:A")


@pytest.mark.parametrize(
    ("asked", "requires", "missing"),
    [
        ("video", ["decoder; extra == 'video' and python_version < '3'"], ""),
        ("video", ["decoder; extra == 'video' and python_version >= '3'"], "decoder"),
        ("Video_Fast", ["decoder; extra == 'video-fast'"], "decoder"),
        ("all", ["Acme[video]; extra == 'all'", "decoder>=2; extra == 'video'"], "decoder>=2"),
        ("all", ["acme[all]; extra == 'all'", "installed; extra == 'all'"], ""),
        ("a,b", ["one; extra == 'a'", "two<3,>=1; extra == 'b'", "three; extra == 'c'"], "one, two>=1,<3"),
        ("video", ["decoder; extra == 'video'", "broken ! ; extra == 'video'"], "decoder"),
    ],
)
def test_markers_of_extras_are_evaluated(site: Any, asked: str, requires: list[str], missing: str) -> None:
    site.add("installed", "1.0")
    site.add("acme", "1.0", {GROUP: {"a": f"acme:A [{asked}]"}}, requires=requires)
    manager = site.manager()
    assert manager.discover().diagnostics == ()
    (spec,) = manager.specs(GROUP)
    assert spec.status is (Status.MISSING_EXTRA if missing else Status.AVAILABLE)
    assert spec.detail == (f"it needs {missing}; run: pip install 'acme[{asked}]'" if missing else "")


def test_extra_that_brings_nothing(site: Any) -> None:
    site.add("acme", "1.0", {GROUP: {"a": "acme:A [vidoe]"}}, requires=["decoder; extra == 'video'"])
    (diagnostic,) = site.manager().discover().diagnostics
    assert (diagnostic.level, diagnostic.code, diagnostic.message) == (
        "warning",
        "unknown-extra",
        "acme 1.0: 'a' in mm_core.predictor_models asks for the extra 'vidoe', which brings no requirement; "
        "did it mean 'video'?",
    )


def test_malformed_declaration_is_broken_before_any_import(site: Any) -> None:
    site.add("acme", "1.0", {GROUP: {"a": "acme"}})
    with pytest.raises(BrokenPluginError) as raised:
        site.manager().resolve(GROUP, "a")
    assert str(raised.value) == (
        "the predictor 'a' of acme 1.0 is broken: its target 'acme' is not of the form package.module:object"
    )
    assert raised.value.spec is not None
    assert raised.value.spec.distribution == "acme"


def test_every_registry_error_is_the_users_and_says_so() -> None:
    for kind in (UnknownIdError, BrokenPluginError, AmbiguousIdError, UnavailablePluginError, RegistryError):
        error = kind("what and why")
        assert isinstance(error, UserError)
        assert (str(error), error.exit_code) == ("what and why", 2)


class TestCompanions:
    """`find`: the config class, sharding policy or weights adapter of a component."""

    def test_none_is_no_error(self, site: Any) -> None:
        site.add("acme", entries={GROUP: {"a": "acme:A"}})
        assert site.manager().find(CONFIGS, "predictor/a", "acme") is None

    def test_own_distribution_comes_first(self, site: Any) -> None:
        for name in ("acme", "beta"):
            site.add(name, entries={GROUP: {"a": f"{name}:A"}, CONFIGS: {"predictor/a": f"{name}:C"}})
        manager = site.manager()
        for name in ("acme", "beta"):
            found = manager.find(CONFIGS, "predictor/a", name)
            assert found is not None
            assert found.target == f"{name}:C"
        with pytest.raises(
            AmbiguousIdError,
            match=r'; put "config/predictor/a" = "acme" \(or "beta"\) under \[plugins.prefer\]',
        ):
            manager.find(CONFIGS, "predictor/a")

    def test_another_distribution_may_provide_it(self, site: Any) -> None:
        site.add("acme", entries={GROUP: {"a": "acme:A"}})
        site.add("helper", entries={CONFIGS: {"predictor/a": "helper:C"}})
        found = site.manager().find(CONFIGS, "predictor/a", "acme")
        assert found is not None
        assert found.distribution == "helper"

    def test_a_rivals_companion_is_not_borrowed(self, site: Any) -> None:
        site.add("acme", entries={GROUP: {"a": "acme:A"}})
        site.add("beta", entries={GROUP: {"a": "beta:A"}, CONFIGS: {"predictor/a": "beta:C"}})
        assert site.manager().find(CONFIGS, "predictor/a", "acme") is None

    def test_blocked_companion_does_not_count(self, site: Any) -> None:
        site.add("acme", entries={GROUP: {"a": "acme:A"}})
        site.add("helper", entries={CONFIGS: {"predictor/a": "helper:C"}})
        assert site.manager(MM_PLUGINS="acme").find(CONFIGS, "predictor/a", "acme") is None

    def test_unusable_companion_is_not_silently_dropped(self, site: Any) -> None:
        site.add("mmzoo-core", "0.1.0")
        site.add("acme", entries={GROUP: {"a": "acme:A"}})
        site.add("helper", entries={CONFIGS: {"predictor/a": "helper:C"}}, requires=["mmzoo-core>=9"])
        with pytest.raises(UnavailablePluginError):
            site.manager().find(CONFIGS, "predictor/a", "acme")

    def test_qualified_id(self, site: Any) -> None:
        site.add("acme", entries={CONFIGS: {"predictor/a": "acme:C"}})
        manager = site.manager()
        assert manager.resolve(CONFIGS, "predictor/a").target == "acme:C"
        assert manager.resolve(CONFIGS, "acme/predictor/a").target == "acme:C"
        with pytest.raises(
            UnknownIdError, match="no installed distribution offers the config class 'predictor/b'"
        ):
            manager.resolve(CONFIGS, "predictor/b")
