"""Old ids, dropped ids, and who is known to provide what."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_registry import (
    AmbiguousIdError,
    BrokenPluginError,
    PluginManager,
    Registry,
    RegistryError,
    Status,
    UnavailablePluginError,
    UnknownIdError,
)
from mm_registry.known_providers import KNOWN_PROVIDERS, known_providers
from mm_registry.selection import SelectionLayer

GROUP = "mm_core.predictor_models"
AES = "mm_core.ae_models"
ALIASES = "mm_core.aliases"
FAREWELLS = "mm_core.farewells"
PROVIDERS = "mm_core.providers"


def unknown(manager: PluginManager, group: str, id: str) -> str:
    with pytest.raises(UnknownIdError) as raised:
        manager.resolve(group, id)
    return str(raised.value)


class TestAliases:
    def test_an_old_id_works_and_says_so_once(
        self, site: Any, caplog: pytest.LogCaptureFixture, imports: list[str]
    ) -> None:
        site.add(
            "acme",
            entries={GROUP: {"new": "acme_renamed:A"}, ALIASES: {"predictor/old": "new"}},
            modules={"acme_renamed.py": "class A: pass"},
        )
        manager = site.manager()
        registry: Registry[Any] = Registry(GROUP, manager)
        assert "old" in registry
        assert "acme/old" in registry
        assert (list(registry), len(registry)) == (["new"], 1)
        assert registry.spec("old") == registry.spec("acme/old") == registry.spec("new")
        assert (manager.alias(GROUP, "old"), manager.alias(GROUP, "acme/old")) == ("new", "acme/new")
        assert manager.alias(GROUP, "new") is None
        assert manager.alias(GROUP, "nothing") is None
        assert "old" not in Registry[Any](AES, manager), "an alias is of one role"
        assert manager.discover().diagnostics == ()
        assert "acme_renamed" not in imports
        with caplog.at_level(logging.WARNING, logger="mm_registry.registry"):
            assert registry["old"] is registry["old"] is registry["new"] is registry["acme/new"]
        assert [record.message for record in caplog.records] == [
            "'old' is an old id in mm_core.predictor_models; write 'new' instead"
        ]

    def test_an_id_that_exists_wins(self, site: Any) -> None:
        site.add("acme", "1.0", {GROUP: {"new": "a:A"}, ALIASES: {"predictor/taken": "new"}})
        site.add("beta", "2.0", {GROUP: {"taken": "b:A"}})
        manager = site.manager()
        assert manager.resolve(GROUP, "taken").target == "b:A"
        assert manager.resolve(GROUP, "acme/taken").target == "a:A"
        assert (manager.alias(GROUP, "taken"), manager.alias(GROUP, "acme/taken")) == (None, "acme/new")
        (diagnostic,) = manager.discover().diagnostics
        assert (diagnostic.level, diagnostic.code, diagnostic.message) == (
            "warning",
            "alias-is-taken",
            "acme 1.0: its old id 'predictor/taken' is an id of beta 2.0, which wins; acme/taken still means 'new'",
        )
        (alias,) = manager.specs(ALIASES)
        assert (alias.status, alias.detail) == (
            Status.SHADOWED,
            "beta 2.0 offers 'taken' itself; write acme/taken to mean this one",
        )
        manager.select_for_job(SelectionLayer.from_table("job", {"disable": ["beta"]}))
        assert manager.resolve(GROUP, "taken").target == "a:A", "beta takes no part, so it takes no id"

    def test_an_old_id_means_its_own_distributions_component(self, site: Any) -> None:
        """Also where the new id is contested: then the qualified form is what to write."""
        site.add("acme", entries={GROUP: {"new": "a:A"}, ALIASES: {"predictor/old": "new"}})
        site.add("beta", entries={GROUP: {"new": "b:A"}})
        manager = site.manager()
        assert manager.resolve(GROUP, "old").target == "a:A"
        assert manager.alias(GROUP, "old") == "acme/new"

    def test_two_aliases_are_ambiguous_until_settled(self, site: Any) -> None:
        for name in ("acme", "beta"):
            site.add(name, "1.0", {GROUP: {f"{name}_new": "m:A"}, ALIASES: {"predictor/old": f"{name}_new"}})
        manager = site.manager()
        with pytest.raises(AmbiguousIdError) as raised:
            manager.resolve(GROUP, "old")
        assert str(raised.value) == (
            "the predictor 'old' is offered by acme 1.0 and beta 1.0 (as an old id); write the one that you mean "
            'under predictor.model_id: "acme/old" or "beta/old", or put "predictor/old" = "acme" (or "beta") under '
            "[plugins.prefer] in mmzoo.toml"
        )
        assert {spec.status for spec in manager.specs(ALIASES)} == {Status.AMBIGUOUS}
        manager.select_for_job(SelectionLayer.from_table("job", {"prefer": {"predictor/old": "beta"}}))
        assert manager.resolve(GROUP, "old").id == "beta_new"
        assert manager.unmatched(manager.selection.layers[-1]) == [], "an old id can be preferred"

    @pytest.mark.parametrize(
        ("entries", "aliases", "code", "why"),
        [
            (
                {"new": "m:A"},
                {"old": "nwe"},
                "alias-to-nothing",
                "an old id of 'nwe', which acme does not offer",
            ),
            (
                {"new": "m:A"},
                {"old": "older", "older": "new"},
                "alias-chain",
                "an old id of 'older', which is an old id itself; name the newest id",
            ),
            (
                {"new": "m:A", "old": "m:B"},
                {"old": "new"},
                "alias-is-taken",
                "an old id of 'new', but 'old' is an id of the same distribution, which wins",
            ),
        ],
    )
    def test_refused(
        self, site: Any, entries: dict[str, str], aliases: dict[str, str], code: str, why: str
    ) -> None:
        names = {f"predictor/{old}": new for old, new in aliases.items()}
        site.add("acme", "1.0", {GROUP: entries, ALIASES: names})
        manager = site.manager()
        (diagnostic,) = manager.discover().diagnostics
        assert (diagnostic.level, diagnostic.code) == ("error", code)
        assert diagnostic.message == f"acme 1.0: 'predictor/old' in mm_core.aliases: it is {why}"
        if "old" in entries:
            assert manager.resolve(GROUP, "old").target == "m:B"
            return
        assert manager.offers(GROUP, "old")
        with pytest.raises(BrokenPluginError) as raised:
            manager.resolve(GROUP, "old")
        assert str(raised.value) == f"the alias 'predictor/old' of acme 1.0 is broken: it is {why}"
        assert manager.alias(GROUP, "old") is None

    def test_a_new_id_that_is_no_python_name(self, site: Any) -> None:
        """Build backends accept only Python names as values of entry points."""
        site.add("acme", entries={GROUP: {"wan-dit.v2": "a:A"}, ALIASES: {"predictor/old": "wan_dit_v2"}})
        assert site.manager().resolve(GROUP, "old").id == "wan-dit.v2"

    def test_of_a_distribution_that_takes_no_part(self, site: Any) -> None:
        site.add("acme", "1.0", {GROUP: {"new": "a:A"}, ALIASES: {"predictor/old": "new"}})
        with pytest.raises(
            UnavailablePluginError,
            match=r"alias 'predictor/old' of acme 1\.0 cannot be used: MM_PLUGINS='x' does not list acme",
        ):
            site.manager(MM_PLUGINS="x").resolve(GROUP, "old")

    def test_is_nothing_to_import_or_to_register(self, site: Any) -> None:
        site.add("acme", "1.0", {GROUP: {"new": "a:A"}, ALIASES: {"predictor/old": "new"}})
        manager = site.manager()
        with pytest.raises(RegistryError, match="is nothing to import: its value is 'new'"):
            manager.load(manager.specs(ALIASES)[0])
        with pytest.raises(RegistryError, match="facts about ids"):
            manager.register(ALIASES, "predictor/older", "new")

    @pytest.mark.parametrize(
        ("group", "value"), [(ALIASES, "a b"), (FAREWELLS, "soon"), (FAREWELLS, ""), (PROVIDERS, "a b")]
    )
    def test_malformed_value(self, site: Any, group: str, value: str) -> None:
        site.add("acme", "1.0", {GROUP: {"new": "a:A"}, group: {"predictor/old": value}})
        manager = site.manager()
        (diagnostic,) = manager.discover().diagnostics
        assert (diagnostic.level, diagnostic.code) == ("error", "malformed-value")
        (spec,) = manager.specs(group)
        assert spec.status is Status.BROKEN
        assert manager.resolve(GROUP, "new").target == "a:A"
        assert manager.offers(GROUP, "old") is (group == ALIASES)


class TestFarewells:
    @pytest.mark.parametrize("written", ["0.3.2", "v0_3_2"])
    def test_names_the_last_version(self, site: Any, written: str) -> None:
        site.add(
            "acme", "1.0", {GROUP: {"giraffe_new": "a:A"}, FAREWELLS: {"predictor/giraffe_old": written}}
        )
        manager = site.manager()
        assert unknown(manager, GROUP, "giraffe_old") == (
            "no installed distribution offers the predictor 'giraffe_old'; acme dropped it, 0.3.2 was the last version "
            "that had it: `pip install 'acme==0.3.2'`; did you mean 'giraffe_new' (acme 1.0)?"
        )
        assert "giraffe_old" not in Registry[Any](GROUP, manager)
        assert "dropped" not in unknown(manager, AES, "giraffe_old")
        assert "dropped" not in unknown(site.manager(MM_PLUGINS="x"), GROUP, "giraffe_old")
        assert manager.discover().diagnostics == ()

    def test_of_an_id_that_exists(self, site: Any) -> None:
        site.add("acme", "1.0", {GROUP: {"here": "a:A"}, FAREWELLS: {"predictor/here": "0.1"}})
        site.add("beta", "1.0", {FAREWELLS: {"predictor/here": "0.1"}})  # it moved from there: nothing odd
        manager = site.manager()
        (diagnostic,) = manager.discover().diagnostics
        assert (diagnostic.code, diagnostic.message) == (
            "farewell-of-existing",
            "acme 1.0: it says farewell to 'predictor/here', which it still offers",
        )
        assert manager.resolve(GROUP, "here").target == "a:A"

    def test_several_say_it_by_name(self, site: Any) -> None:
        for name in ("zeta", "acme"):
            site.add(name, "1.0", {FAREWELLS: {"predictor/gone": "0.9"}})
        message = unknown(site.manager(), GROUP, "gone")
        assert message.index("pip install 'acme==0.9'") < message.index("pip install 'zeta==0.9'")
        assert {spec.status for spec in site.manager().specs(FAREWELLS)} == {Status.AVAILABLE}


class TestProviders:
    def test_a_plugin_extends_the_table(self, site: Any) -> None:
        site.add("acme", "1.0", {PROVIDERS: {"predictor/hunyuan": "mmzoo_plugin_hunyuan"}})
        manager = site.manager()
        install = "run `pip install mmzoo-plugin-hunyuan`"
        assert unknown(manager, GROUP, "hunyuan") == (
            "no installed distribution offers the predictor 'hunyuan'; "
            f"mmzoo-plugin-hunyuan does, and is not installed; {install}"
        )
        assert "'hunyuan' is a predictor, not an ae: it comes from mmzoo-plugin-hunyuan" in unknown(
            manager, AES, "hunyuan"
        )
        assert "did you mean 'hunyuan' (of mmzoo-plugin-hunyuan, which is not installed" in unknown(
            manager, GROUP, "hunyaun"
        )
        assert "mmzoo-plugin-hunyuan is not installed; " + install in unknown(
            manager, GROUP, "mmzoo-plugin-hunyuan/hunyuan"
        )
        assert "hunyuan" not in unknown(site.manager(MM_PLUGINS="x"), GROUP, "hunyaun")[60:]

    def test_another_answer_stands_beside_ours(self, site: Any) -> None:
        site.add("acme", "1.0", {PROVIDERS: {"predictor/wandit": "other_wan"}})
        site.add("beta", "1.0", {PROVIDERS: {"predictor/wandit": "mmzoo_plugin_wan22"}})
        manager = site.manager()
        message = unknown(manager, GROUP, "wandit")
        ours = (
            "mmzoo-plugin-wan22 does, and is not installed; run `pip install ./mm_plugins/wan22` in a clone"
        )
        theirs = "other-wan does, and is not installed; run `pip install other-wan`"
        assert message.index(ours) < message.index(theirs)
        assert "pip install mmzoo-plugin-wan22" not in message, "a plugin does not say how to install ours"
        assert {spec.status for spec in manager.specs(PROVIDERS)} == {Status.AVAILABLE}

    def test_our_own_table_comes_first(self) -> None:
        assert tuple(known_providers({})) == KNOWN_PROVIDERS


words = st.text(max_size=90)


@given(id=st.one_of(words, st.tuples(words, words).map("/".join)), noise=st.lists(words, max_size=5))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_message_is_one_short_line_for_any_id(site: Any, id: str, noise: list[str]) -> None:
    """With much to say: hundreds of near ids, farewells and providers with long names, unreadable metadata."""
    if not site.distributions:
        long = "mmzoo-plugin-" + "long-" * 20
        ids = {f"wan_{number:03}_{'x' * 40}": "a:A" for number in range(120)}
        site.add(long + "a", entries={GROUP: ids, AES: {"other": "a:A"}})
        site.add(long + "b", entries={FAREWELLS: {"predictor/other": "v1_2_3"}})
        site.add(long + "c", entries={PROVIDERS: {"predictor/other": (long + "d").replace("-", "_")}})
        (site.add(long + "e", entries={GROUP: ids}) / "METADATA").write_bytes(b"\xff")
        site.shared_manager = site.manager()
    manager = site.shared_manager
    for asked in (id, "other", "".join(noise), manager.ids(GROUP)[0] + id):
        if manager.offers(GROUP, asked):
            continue
        with pytest.raises(KeyError) as raised:
            manager.resolve(GROUP, asked)
        assert isinstance(raised.value, UnknownIdError)
        assert len(str(raised.value).encode("utf-8", "replace")) <= 1000
        assert len(str(raised.value).splitlines()) == 1
