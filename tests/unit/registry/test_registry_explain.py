"""How an id was decided, said in words; what decides all of them, as data; and that it can be frozen."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mm_registry import PluginManager, Registry, RegistryError
from mm_registry.selection import SelectionLayer

GROUP = "mm_core.predictor_models"
AES = "mm_core.ae_models"
ALIASES = "mm_core.aliases"


@pytest.fixture
def manager(site: Any) -> PluginManager:
    site.add("mmzoo-core", "0.1.0")
    site.add("acme", "1.0", {GROUP: {"shared": "a:A", "new": "a:N"}, ALIASES: {"predictor/old": "new"}})
    site.add("beta", "2.0", {GROUP: {"shared": "b:A"}, "mm_core.hooks": {"hooks": "b"}})
    site.add("gamma", "3.0", {GROUP: {"shared": "g:A"}}, requires=["mmzoo-core>=9"])
    return site.manager()


def select(manager: PluginManager, **table: Any) -> None:
    lines = {("disable", "gamma"): 3, ("prefer",): 5}
    manager.select_for_job(SelectionLayer.from_table("job.json", table, lines))


def test_a_sole_claim(manager: PluginManager, imports: list[str]) -> None:
    said = manager.explain(GROUP, "new")
    assert said.outcome == "means a:N of acme 1.0 (wheel)"
    assert [(claim.spec.distribution, claim.verdict) for claim in said.claims] == [("acme", "chosen")]
    assert (said.alias_of, said.selection) == (None, ())
    assert said.chosen == manager.resolve(GROUP, "new")
    assert not {"a", "b", "g"} & set(imports)


def test_a_collision_and_what_settles_it(manager: PluginManager) -> None:
    said = manager.explain(GROUP, "shared")
    assert said.chosen is None
    assert said.outcome.startswith(
        "the predictor 'shared' is offered by acme 1.0 and beta 2.0 and gamma 3.0; "
    )
    assert {claim.spec.distribution: claim.verdict for claim in said.claims} == {
        "acme": "ambiguous: beta 2.0, gamma 3.0 claims it too; write acme/shared to mean this one",
        "beta": "ambiguous: acme 1.0, gamma 3.0 claims it too; write beta/shared to mean this one",
        "gamma": "incompatible: it needs mmzoo-core >=9 and 0.1.0 is installed; install a version made for "
        "mmzoo-core 0.1.0, or mmzoo-core in that range",
    }
    select(manager, disable=["gamma"], prefer={"predictor/shared": "beta"})
    said = manager.explain(GROUP, "shared")
    assert said.outcome == "means b:A of beta 2.0 (wheel): job.json:5 prefers beta"
    assert said.selection == (
        "job.json:3 disables gamma",
        "job.json:5 prefers beta for 'predictor/shared'",
    )
    assert [claim.verdict for claim in said.claims] == [
        "shadowed: job.json:5 prefers beta; write acme/shared to mean this one",
        "chosen",
        "blocked: job.json:3 disables gamma; take it out there",
    ]
    qualified = manager.explain(GROUP, "acme/shared")
    assert (qualified.id, qualified.outcome) == ("acme/shared", "means a:A of acme 1.0 (wheel)")
    assert [claim.verdict for claim in qualified.claims][:2] == [
        "chosen",
        "could be used; another one was asked for",
    ]


def test_an_old_id(manager: PluginManager) -> None:
    said = manager.explain(GROUP, "old")
    assert (said.alias_of, said.chosen and said.chosen.id) == ("new", "new")
    assert said.outcome == "means a:N of acme 1.0 (wheel) (an old id; write 'new' instead)"
    assert [claim.verdict for claim in said.claims] == ["chosen, as an old id of 'new'"]


def test_an_unknown_id_is_an_outcome(manager: PluginManager) -> None:
    for id in ("sharde", "", "a/b/c", "\x00", "no-such/shared"):
        said = manager.explain(GROUP, id)
        assert said.chosen is None
        assert " no predictor " in said.outcome or said.outcome.startswith("no installed distribution offers")
    assert manager.explain(GROUP, "sharde").claims == ()
    with pytest.raises(RegistryError, match="there is no group"):
        manager.explain("mm_core.predictors", "shared")


def test_explanation_is_json(manager: PluginManager) -> None:
    data = json.loads(json.dumps(manager.explain(GROUP, "shared").to_dict()))
    assert list(data) == ["group", "id", "alias_of", "claims", "selection", "chosen", "outcome"]
    assert data["claims"][0]["distribution"] == "acme"
    assert list(data["claims"][0])[:9] == [
        "id",
        "group",
        "distribution",
        "version",
        "origin",
        "status",
        "target",
        "path",
        "detail",
    ]
    assert manager.explain(GROUP, "new").to_dict()["chosen"]["status"] == "available"


class TestPluginSet:
    def test_holds_what_decides_the_meaning_of_ids(self, manager: PluginManager) -> None:
        said = manager.plugin_set()
        assert json.loads(json.dumps(said)) == said
        assert said["core"] == {"mmzoo-core": "0.1.0", "mmzoo-registry": None}
        assert said["claims"] == [
            [ALIASES, "predictor/old", "acme", "1.0", "new"],
            ["mm_core.hooks", "hooks", "beta", "2.0", "b"],
            [GROUP, "new", "acme", "1.0", "a:N"],
            [GROUP, "shared", "acme", "1.0", "a:A"],
            [GROUP, "shared", "beta", "2.0", "b:A"],
        ], "gamma cannot be used, so it decides nothing"

    def test_a_different_choice_is_a_different_set(self, manager: PluginManager) -> None:
        """Ranks that prefer different distributions would build different models from the same id."""
        seen = {manager.fingerprint()}
        for table in (
            {"prefer": {"predictor/shared": "acme"}},
            {"prefer": {"predictor/shared": "beta"}},
            {"disable": ["beta"]},
            {"allow": ["beta"]},
        ):
            select(manager, **table)
            seen.add(manager.fingerprint())
        manager.select_for_job(None)
        manager.register(GROUP, "mine", dict)
        seen.add(manager.fingerprint())
        assert len(seen) == 6

    def test_what_only_helps_does_not_count(self, site: Any) -> None:
        site.add("acme", "1.0", {GROUP: {"a": "a:A"}})
        before = site.manager().fingerprint()
        site.add("helper", "1.0", {"mm_core.providers": {"ae/x": "y"}, "mm_core.farewells": {"ae/z": "0.1"}})
        assert site.manager().fingerprint() == before

    def test_an_import_that_failed_does_not_count(self, site: Any) -> None:
        site.add("acme", "1.0", {GROUP: {"a": "not_there_at_all:A"}})
        manager = site.manager()
        before = manager.fingerprint()
        with pytest.raises(RegistryError):
            Registry[Any](GROUP, manager)["a"]
        assert manager.fingerprint() == before


def test_records_of_distributions(manager: PluginManager) -> None:
    assert [record.name for record in manager.distributions()] == ["acme", "beta", "gamma"]
    record = manager.record("Gamma")
    assert record is not None
    assert (record.version, record.requires) == ("3.0", ("mmzoo-core>=9",))
    assert manager.record("mmzoo-core") is None, "it declares nothing here"
    assert manager.record("nothing") is None


class TestFreeze:
    def test_nothing_changes_the_meaning_of_an_id_any_more(self, manager: PluginManager) -> None:
        registry: Registry[Any] = Registry(GROUP, manager)
        registry.register("mine", dict)
        before = manager.runtime_entries(GROUP)
        registry.register("other", dict)
        assert not manager.frozen
        manager.freeze()
        assert manager.frozen
        for change in (
            lambda: registry.register("late", dict),
            lambda: registry.register("late")(dict),
            lambda: registry.register("mine", list, replace=True),
            lambda: manager.restore_runtime(GROUP, before),
            lambda: select(manager, disable=["beta"]),
        ):
            with pytest.raises(RegistryError, match="frozen"):
                change()
        assert registry["mine"] is registry["other"] is dict
        assert "late" not in registry
        # What is so already may be said again.
        registry.register("mine", dict)
        manager.restore_runtime(GROUP, manager.runtime_entries(GROUP))
        manager.select_for_job(None)

    def test_one_group(self, manager: PluginManager) -> None:
        predictors, aes = Registry[Any](GROUP, manager), Registry[Any](AES, manager)
        predictors.freeze()
        with pytest.raises(
            RegistryError, match=r"'mine' cannot be registered: the registry mm_core\.predictor_models"
        ):
            predictors.register("mine", dict)
        aes.register("mine", dict)
        assert not manager.frozen
        with pytest.raises(RegistryError, match="there is no group"):
            manager.freeze("mm_core.nothing")

    def test_temporary_ends_what_was_frozen_in_it(self, manager: PluginManager) -> None:
        registry: Registry[Any] = Registry(GROUP, manager)
        with registry.temporary():
            registry.register("mine", dict)
            manager.freeze()
        assert not manager.frozen
        assert "mine" not in registry
        manager.freeze()
        with registry.temporary(), pytest.raises(RegistryError, match="frozen"):
            registry.register("mine", dict)
        assert manager.frozen
