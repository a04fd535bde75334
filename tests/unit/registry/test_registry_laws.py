"""`Registry` against a plain dict, for random sets of distributions on disk: the same answers, no import before an
item is asked for, and no trace of the order in which things are found.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_registry import AmbiguousIdError, PluginManager, Registry, RegistryError

GROUP = "mm_core.predictor_models"
PACKAGE = "plugin_of_the_laws"
#: Any attribute exists, and is told apart by its name.
MODULE = "def __getattr__(name):\n    return ['object', name]\n"

ids = st.text("abAB01_.+-", min_size=1, max_size=5).filter(lambda name: name[0] not in ".+-")
names = st.sampled_from(["acme", "beta", "mmzoo-plugin-x", "Zeta.Two"])
old_ids = st.sampled_from(["old", "older", "a", "b"])


class World:
    """Distributions by name: the ids that they offer, their old ids (old -> new), the folder each lies in; and what
    the program registers.
    """

    def __init__(
        self,
        offered: Mapping[str, list[str]],
        aliases: Mapping[tuple[str, str], int],
        places: Mapping[str, int],
        runtime: list[str],
    ) -> None:
        self.offered = {name: sorted(set(offers)) for name, offers in offered.items()}
        self.runtime = sorted(set(runtime))
        self.places = places
        self.aliases = {
            (name, old): self.offered[name][index % len(self.offered[name])]
            for (name, old), index in aliases.items()
            if self.offered.get(name) and old not in self.offered[name]
        }
        # The model: id -> the object of each claimant.
        self.model: dict[str, dict[str, object]] = {}
        for name, offers in self.offered.items():
            for number, id in enumerate(offers):
                self.model.setdefault(id, {})[name] = ["object", self.object_name(name, number)]
        for id in self.runtime:
            self.model.setdefault(id, {})["runtime"] = ["runtime", id]

    @staticmethod
    def object_name(name: str, number: int) -> str:
        return f"{name.replace('-', '_').replace('.', '_')}_{number}"

    def write(self, root: Path) -> list[str]:
        """Write the distributions and return the folders, which the path may name in any order."""
        folders = [root / f"site{number}" for number in range(3)]
        for folder in folders:
            folder.mkdir()
        (folders[0] / f"{PACKAGE}.py").write_text(MODULE)
        for name, offers in self.offered.items():
            info = folders[self.places.get(name, 0)] / f"{name.replace('-', '_')}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n")
            lines = [f"[{GROUP}]"]
            lines += [f"{id} = {PACKAGE}:{self.object_name(name, n)}" for n, id in enumerate(offers)]
            lines += ["[mm_core.aliases]"]
            lines += [f"predictor/{old} = {new}" for (who, old), new in self.aliases.items() if who == name]
            (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        return [str(folder) for folder in folders]

    def registry(self, path: list[str], registered: list[str]) -> Registry[Any]:
        manager = PluginManager(path, environ={}, environment_file=None, project_folder=None)
        registry: Registry[Any] = Registry(GROUP, manager)
        for id in registered:
            registry.register(id, ["runtime", id])
        return registry


worlds = st.builds(
    World,
    offered=st.dictionaries(names, st.lists(ids, max_size=4), max_size=4),
    aliases=st.dictionaries(st.tuples(names, old_ids), st.integers(0, 3), max_size=3),
    places=st.dictionaries(names, st.integers(0, 2)),
    runtime=st.lists(ids, max_size=2),
)
asked_for = st.one_of(ids, old_ids, st.text(max_size=6), st.integers(), st.none(), st.tuples())


@contextmanager
def no_import_of_plugins() -> Iterator[None]:
    """Fail when anything looks for the plugins' package."""

    class Guard:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] == PACKAGE:
                raise AssertionError(f"{name} is imported by a question that needs metadata only")

    guard = Guard()
    sys.meta_path.insert(0, guard)  # type: ignore[arg-type]
    try:
        yield
        assert PACKAGE not in sys.modules
    finally:
        sys.meta_path.remove(guard)  # type: ignore[arg-type]


@given(world=worlds, asked=asked_for)
@settings(max_examples=100, deadline=None)
def test_mapping_laws(tmp_path_factory: pytest.TempPathFactory, world: World, asked: Any) -> None:
    path = world.write(tmp_path_factory.mktemp("laws"))
    registry, model = world.registry(path, world.runtime), world.model
    olds: dict[str, set[str]] = {}
    for name, old in world.aliases:
        olds.setdefault(old, set()).add(name)
    with no_import_of_plugins():
        assert isinstance(registry, Mapping)
        assert registry.keys() == model.keys()
        assert list(registry) == sorted(model)
        assert len(registry) == len(list(registry)) == len(model)
        assert bool(registry) is bool(model)
        assert all(id in registry for id in model)
        assert all(old in registry for old in olds)
        assert all(f"{name}/{id}" in registry for id, claims in model.items() for name in claims)
        assert (registry == registry, registry == dict.fromkeys(model)) == (True, False)
        assert len({registry, registry}) == 1
        assert len(registry.specs()) == sum(map(len, model.values()))
        assert all(repr(registry).count(id) for id in model)
        if not isinstance(asked, str) or (asked not in model and asked not in olds and "/" not in asked):
            assert asked not in registry
            assert registry.get(asked, 7) == 7
            assert registry.get(asked) is None
            with pytest.raises(KeyError):
                registry[asked]
        for id, claims in model.items():
            if len(claims) > 1:
                with pytest.raises(AmbiguousIdError) as raised:
                    registry.get(id)
                assert [spec.distribution for spec in raised.value.specs] == sorted(claims, key=str.lower)

    sys.path.insert(0, path[0])
    try:
        sole = {id: next(iter(claims.values())) for id, claims in model.items() if len(claims) == 1}
        assert {id: registry[id] for id in sole} == sole
        assert all(registry.get(id) is registry[id] for id in sole)
        if len(sole) == len(model):
            assert dict(registry.items()) == sole
            assert list(registry.values()) == [sole[id] for id in sorted(sole)]
        for id, claims in model.items():
            for name, expected in claims.items():
                assert registry[f"{name}/{id}"] == expected
        for old, owners in olds.items():
            if old not in model and len(owners) == 1:
                (name,) = owners
                assert registry[old] == model[world.aliases[name, old]][name]
    finally:
        sys.path.remove(path[0])
        sys.modules.pop(PACKAGE, None)


@given(world=worlds, order=st.permutations([0, 1, 2]), backwards=st.booleans())
@settings(max_examples=60, deadline=None)
def test_order_does_not_show(
    tmp_path_factory: pytest.TempPathFactory, world: World, order: list[int], backwards: bool
) -> None:
    path = world.write(tmp_path_factory.mktemp("order"))
    ours = world.registry(path, world.runtime)
    theirs = world.registry([path[index] for index in order], world.runtime[:: -1 if backwards else 1])
    assert list(ours) == list(theirs)
    assert ours.specs() == theirs.specs()
    assert ours.manager.discover() == theirs.manager.discover()
    assert ours.manager.fingerprint() == theirs.manager.fingerprint()
    for id in [*world.model, *(old for _, old in world.aliases), "ab0", "acme/ab0", "zzzzzz"]:
        assert answer(ours, id) == answer(theirs, id)
        assert ours.manager.explain(GROUP, id) == theirs.manager.explain(GROUP, id)


def answer(registry: Registry[Any], id: str) -> object:
    try:
        return registry.spec(id)
    except RegistryError as error:
        return type(error), str(error)


PROBE = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import mm_registry
manager = mm_registry.PluginManager(json.loads(sys.argv[1]), environ={}, environment_file=None, project_folder=None)
said = []
for id in ("shared", "sharde", "old"):
    try:
        mm_registry.Registry("mm_core.predictor_models", manager)[id]
    except mm_registry.RegistryError as error:
        said.append(f"{type(error).__name__}: {error}")
said += [str(diagnostic) for diagnostic in manager.discover().diagnostics]
json.dump([said, manager.fingerprint()], sys.stdout)
"""


def test_collision_reads_the_same_in_every_process(tmp_path: Path) -> None:
    """20 of 20: five orders of the path times four hash seeds, each in a process of its own."""
    folders = []
    for name, version in (("acme", "1.0"), ("beta", "2.0"), ("zeta", "0.1")):
        folder = tmp_path / name
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
        lines = [f"[{GROUP}]", "shared = nothing_to_import:A", f"{name}_new = nothing_to_import:B"]
        lines += ["[mm_core.aliases]", f"predictor/old = {name}_new", "predictor/gone = nothing"]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        folders.append(str(folder))
    orders = list(itertools.permutations(folders))[:5]
    outputs = set()
    for order, seed in itertools.product(orders, ("0", "1", "42", "random")):
        run = subprocess.run(
            [sys.executable, "-c", PROBE, json.dumps(order)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        outputs.add(run.stdout)
    (said, _), *others = map(json.loads, outputs)
    assert others == []
    assert said[0] == (
        "AmbiguousIdError: the predictor 'shared' is offered by acme 1.0 and beta 2.0 and zeta 0.1; write the one "
        'that you mean under predictor.model_id: "acme/shared" or "beta/shared" or "zeta/shared", or put '
        '"predictor/shared" = "acme" (or "beta", or "zeta") under [plugins.prefer] in mmzoo.toml'
    )
    assert said[1].startswith("UnknownIdError: ")
    assert said[2].startswith("AmbiguousIdError: ")
    assert len(said) == 6
