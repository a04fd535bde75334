"""Which distributions take part: MM_PLUGINS, the environment's file, the project's, the job's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mm_registry import (
    AmbiguousIdError,
    PluginManager,
    Registry,
    SelectionError,
    Status,
    UnavailablePluginError,
)
from mm_registry.selection import SelectionLayer, environment_file, find_project_file

GROUP = "mm_core.predictor_models"
CONFIGS = "mm_core.configs"


@pytest.fixture
def world(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two distributions that both offer `shared`, and a project folder to write `mmzoo.toml` into."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    for name, version in (("acme", "1.0"), ("beta", "2.0")):
        module = f"{name}_selected_for_test"
        entries = {GROUP: {"shared": f"{module}:A", name: f"{module}:A"}}
        site.add(name, version, entries, modules={f"{module}.py": f"A = {name!r}"})
    return World(site, project)


class World:
    def __init__(self, site: Any, project: Path) -> None:
        self.site = site
        self.project = project
        self.environment = project.parent / "etc" / "plugins.toml"

    def write(self, project: str | None = None, environment: str | None = None) -> None:
        if project is not None:
            (self.project / "mmzoo.toml").write_text(project, encoding="utf-8")
        if environment is not None:
            self.environment.parent.mkdir(exist_ok=True)
            self.environment.write_text(environment, encoding="utf-8")

    def manager(self, job: Mapping[str, Any] | None = None, **environ: str) -> PluginManager:
        manager = PluginManager(
            [str(self.site.root)],
            environ=environ,
            environment_file=self.environment,
            project_folder=self.project,
        )
        if job is not None:
            manager.select_for_job(SelectionLayer.from_table("model.json", job))
        return manager

    def statuses(self, job: Mapping[str, Any] | None = None, **environ: str) -> dict[str, str]:
        specs = self.manager(job, **environ).specs(GROUP)
        return {spec.id: str(spec.status) for spec in specs if spec.id != "shared"}


def test_each_narrower_place_wins_for_a_distribution(world: World) -> None:
    available = {"acme": "available", "beta": "available"}
    assert world.statuses() == available
    world.write(environment='[plugins]\ndisable = ["acme"]\n')
    assert world.statuses() == {**available, "acme": "blocked"}
    world.write(project='[plugins]\nenable = ["Acme"]\ndisable = ["beta"]\n')
    assert world.statuses() == {**available, "beta": "blocked"}
    assert world.statuses({"disable": ["acme"], "enable": ["beta"]}) == {**available, "acme": "blocked"}


def test_allow_lists_can_only_narrow(world: World) -> None:
    world.write(environment='[plugins]\nallow = ["acme", "beta"]\n', project='[plugins]\nallow = ["acme"]\n')
    assert world.statuses() == {"acme": "available", "beta": "not_allowlisted"}
    inner = {"allow": ["acme", "beta"], "enable": ["beta"]}
    assert world.statuses(inner) == {"acme": "available", "beta": "not_allowlisted"}, (
        "enable passes no allow list"
    )
    assert world.statuses(MM_PLUGINS="beta") == {"acme": "not_allowlisted", "beta": "not_allowlisted"}
    assert world.statuses({"allow": []}) == {"acme": "not_allowlisted", "beta": "not_allowlisted"}


def test_messages_name_file_and_line(world: World, imports: list[str]) -> None:
    world.write(project='# ours\n[plugins]\ndisable = [\n  "beta",\n  "acme",  # why\n]\n')
    with pytest.raises(UnavailablePluginError) as raised:
        world.manager().resolve(GROUP, "acme")
    assert str(raised.value) == (
        "the predictor 'acme' of acme 1.0 cannot be used: mmzoo.toml:5 disables acme; take it out there, or run "
        "`mm plugin enable acme --scope project`"
    )
    world.write(project='[plugins]\nallow = ["beta"]\n')
    with pytest.raises(UnavailablePluginError) as raised:
        world.manager().resolve(GROUP, "acme")
    assert str(raised.value) == (
        "the predictor 'acme' of acme 1.0 cannot be used: allow at mmzoo.toml:2 does not list acme; add it there"
    )
    assert not [name for name in imports if "selected_for_test" in name]


def test_a_distribution_that_takes_no_part_contests_nothing(world: World) -> None:
    with pytest.raises(AmbiguousIdError):
        world.manager().resolve(GROUP, "shared")
    world.write(project='[plugins]\ndisable = ["acme"]\n')
    assert world.manager().resolve(GROUP, "shared").distribution == "beta"


def test_prefer_settles_a_collision_and_the_other_is_shadowed(world: World) -> None:
    world.write(project='[plugins.prefer]\n"predictor/shared" = "Beta"\n')
    manager = world.manager()
    assert manager.resolve(GROUP, "shared").distribution == "beta"
    assert manager.resolve(GROUP, "acme/shared").distribution == "acme", "the qualified id means what it says"
    shown = {spec.distribution: spec for spec in manager.specs(GROUP) if spec.id == "shared"}
    assert shown["beta"].status is Status.AVAILABLE
    assert shown["acme"].status is Status.SHADOWED
    assert shown["acme"].detail == "mmzoo.toml:2 prefers beta; write acme/shared to mean this one"
    registry: Registry[str] = Registry(GROUP, manager)
    assert (registry["shared"], registry["acme/shared"]) == ("beta", "acme")
    assert manager.load(shown["acme"]) == "acme"


@pytest.mark.parametrize(
    "text",
    [
        'plugins = { prefer = { "predictor/shared" = "beta" } }',
        '[plugins]\nprefer = { "predictor/shared" = "beta" }',
        '[plugins]\nprefer."predictor/shared" = "beta"',
        "[ plugins . prefer ]  # ours\n'predictor/shared' = 'beta'",
    ],
)
def test_every_way_to_write_it_in_toml(world: World, text: str) -> None:
    world.write(project=text)
    manager = world.manager()
    assert manager.resolve(GROUP, "shared").distribution == "beta"
    assert manager.explain(GROUP, "shared").selection == (
        f"mmzoo.toml:{text.count(chr(10)) + 1} prefers beta for 'predictor/shared'",
    )


def test_the_narrowest_prefer_wins_and_the_program_above_all(world: World) -> None:
    world.write(
        environment='[plugins.prefer]\n"predictor/shared" = "acme"\n',
        project='[plugins.prefer]\n"predictor/shared" = "beta"\n',
    )
    assert world.manager().resolve(GROUP, "shared").distribution == "beta"
    manager = world.manager({"prefer": {"predictor/shared": "acme"}})
    assert manager.resolve(GROUP, "shared").distribution == "acme"
    manager.register(GROUP, "shared", dict)
    assert manager.resolve(GROUP, "shared").distribution == "acme"
    manager.register(GROUP, "shared", dict, replace=True)
    assert manager.resolve(GROUP, "shared").distribution == "runtime"
    assert {s.distribution: s.status for s in manager.specs(GROUP) if s.id == "shared"} == {
        "acme": Status.SHADOWED,
        "beta": Status.SHADOWED,
        "runtime": Status.AVAILABLE,
    }


def test_prefer_means_an_unusable_claim_too(world: World) -> None:
    """It is what the user asked for; another plugin must not step in silently."""
    world.site.add("mmzoo-core", "0.1.0")
    world.site.add("gamma", "3.0", {GROUP: {"shared": "g:A"}}, requires=["mmzoo-core>=9"])
    world.write(project='[plugins.prefer]\n"predictor/shared" = "gamma"\n')
    with pytest.raises(
        UnavailablePluginError, match=r"of gamma 3\.0 cannot be used: it needs mmzoo-core >=9"
    ):
        world.manager().resolve(GROUP, "shared")


def test_prefer_settles_companions(world: World) -> None:
    for name in ("left", "right"):
        world.site.add(name, "1.0", {CONFIGS: {"predictor/acme": f"{name}:C"}})
    with pytest.raises(AmbiguousIdError, match=r'put "config/predictor/acme" = "left" \(or "right"\)'):
        world.manager().find(CONFIGS, "predictor/acme", "acme")
    world.write(project='[plugins.prefer]\n"config/predictor/acme" = "right"\n')
    found = world.manager().find(CONFIGS, "predictor/acme", "acme")
    assert found is not None
    assert found.distribution == "right"


def test_the_line_that_an_ambiguity_prints_settles_it(world: World) -> None:
    with pytest.raises(AmbiguousIdError) as raised:
        world.manager().resolve(GROUP, "shared")
    line = str(raised.value).partition(", or put ")[2].partition(" (or ")[0]
    world.write(project=f"[plugins.prefer]\n{line}\n")
    assert world.manager().resolve(GROUP, "shared").distribution == "acme"


def test_job_selection_is_replaced_and_objects_stay(world: World) -> None:
    manager = world.manager()
    registry: Registry[str] = Registry(GROUP, manager)
    assert registry["acme"] == "acme"
    manager.select_for_job(SelectionLayer.from_table("model.json", {"disable": ["acme"]}))
    with pytest.raises(UnavailablePluginError, match=r"model\.json disables acme"):
        registry["acme"]
    assert sys.modules.pop("acme_selected_for_test").A == "acme"
    manager.select_for_job(SelectionLayer.from_table("model.json", {"disable": ["beta"]}))
    assert registry["acme"] == "acme"
    assert "acme_selected_for_test" not in sys.modules, "it was not imported again"
    manager.select_for_job(None)
    assert registry["beta"] == "beta"


def test_odd_names_are_diagnostics(world: World) -> None:
    world.write(
        project='[plugins]\ndisable = ["acne"]\nenable = ["zzzz"]\n'
        '[plugins.prefer]\n"predictor/acme" = "beta"\n"ae/x" = "runtime"\n"predictor/shared" = "bet"\n'
    )
    manager = world.manager()
    assert [(d.level, d.code, d.message, d.path) for d in manager.discover().diagnostics] == [
        ("warning", code, f"mmzoo.toml:{message}", "mmzoo.toml")
        for code, message in [
            ("preferred-without-claim", "6 prefers 'runtime' for 'ae/x', which it does not offer"),
            (
                "preferred-without-claim",
                "5 prefers 'beta' for 'predictor/acme', which it does not offer; acme does",
            ),
            ("selected-not-installed", "2 disables 'acne', which is not installed; did you mean 'acme'?"),
            (
                "selected-not-installed",
                "7 prefers 'bet' for 'predictor/shared', which is not installed; did you mean 'beta'?",
            ),
            ("selected-not-installed", "3 enables 'zzzz', which is not installed"),
        ]
    ]
    with pytest.raises(AmbiguousIdError):
        manager.resolve(GROUP, "shared")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[plugins]\nx =\n", "mmzoo.toml:2: this is no TOML: Invalid value"),
        ('[plugins]\nallow = ["a"', "mmzoo.toml:2: this is no TOML: Unclosed array"),
        ("\n[plugin]\n", 'mmzoo.toml:2: "plugin" is unknown in a selection file; did you mean "plugins"?'),
        ("[tool.x]\n", 'mmzoo.toml:1: "tool" is unknown in a selection file; the only table is [plugins]'),
        ("plugins = 3\n", 'mmzoo.toml:1: "plugins" is no table; write [plugins]'),
        (
            "[plugins]\n\ndisabled = []\n",
            'mmzoo.toml:3: "disabled" is no key of a selection of plugins; did you mean "disable"?',
        ),
        ("[plugins]\nuse = []\n", "the keys are allow, disable, enable, prefer"),
        (
            '[plugins]\nallow = "acme"\n',
            "mmzoo.toml:2: \"allow\" is 'acme', expected a list of distributions",
        ),
        ("[plugins]\nenable = [3]\n", 'mmzoo.toml:2: "enable" holds 3, expected the name of a distribution'),
        (
            '[plugins]\nallow = [" "]\n',
            "mmzoo.toml:2: \"allow\" holds ' ', expected the name of a distribution",
        ),
        (
            '[plugins]\ndisable = ["acme"]\nenable = [\n"ACME"]\n',
            "mmzoo.toml:4: acme is listed under both enable and disable; keep one of them",
        ),
        (
            '[plugins]\ndisable = ["acme",\n"MMZoo_Core"]\n',
            "mmzoo.toml:3: MMZoo_Core is MM Zoo itself and cannot be disabled",
        ),
        (
            "[plugins]\nprefer = []\n",
            'mmzoo.toml:2: "prefer" is [], expected a table from ids to distributions',
        ),
        (
            '[plugins.prefer]\n"predictr/a" = "acme"\n',
            "mmzoo.toml:2: 'predictr/a' under prefer is not of the form role/id, such as predictor/wandit; "
            "did you mean 'predictor'?",
        ),
        (
            '[plugins.prefer]\nshared = "acme"\n',
            "mmzoo.toml:2: 'shared' under prefer is not of the form role/id",
        ),
        ('[plugins.prefer]\n"predictor/a" = 1\n', "mmzoo.toml:2: \"prefer\" has 1 for 'predictor/a'"),
    ],
)
def test_a_file_that_cannot_be_used(world: World, text: str, said: str) -> None:
    world.write(project=text)
    manager = world.manager()
    for _ in range(2):  # it is said each time, not half applied
        with pytest.raises(SelectionError) as raised:
            manager.resolve(GROUP, "acme")
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_file_that_cannot_be_read(world: World) -> None:
    (world.project / "mmzoo.toml").write_bytes(b"# fine\n# \xff\n")
    with pytest.raises(SelectionError, match=r"^mmzoo\.toml:2: the file is not UTF-8 text"):
        world.manager().discover()
    (world.project / "mmzoo.toml").unlink()
    world.environment.mkdir(parents=True)
    with pytest.raises(SelectionError, match=r"plugins\.toml: the file cannot be read: Is a directory"):
        world.manager().discover()


def test_the_usual_places(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = world.project / "a" / "b"
    inner.mkdir(parents=True)
    world.write(project='[plugins]\ndisable = ["acme"]\n')
    assert find_project_file(inner) == str(world.project / "mmzoo.toml")
    assert find_project_file(world.project.parent) is None
    monkeypatch.chdir(inner)
    monkeypatch.setattr(sys, "prefix", str(world.project.parent / "venv"))
    place = Path(environment_file())
    assert place == world.project.parent / "venv" / "etc" / "mmzoo" / "plugins.toml"
    place.parent.mkdir(parents=True)
    place.write_text('[plugins]\ndisable = ["beta"]\n')
    manager = PluginManager([str(world.site.root)], environ={})
    assert {spec.status for spec in manager.specs(GROUP)} == {Status.BLOCKED}
    assert f"{world.project / 'mmzoo.toml'}:2 disables acme" in manager.specs(GROUP)[0].detail
    nowhere = PluginManager([str(world.site.root)], environ={}, environment_file=None, project_folder=None)
    assert {spec.status for spec in nowhere.specs(GROUP)} == {Status.AVAILABLE, Status.AMBIGUOUS}
    inner.rmdir()  # a working directory that was deleted
    assert find_project_file() is None


def test_core_takes_part_whatever_is_allowed(world: World) -> None:
    world.site.add("mmzoo-core", "0.1.0", {GROUP: {"core": "c:A"}})
    world.write(project="[plugins]\nallow = []\n")
    assert world.manager(MM_PLUGINS="").resolve(GROUP, "core").distribution == "mmzoo-core"
