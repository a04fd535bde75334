"""Real metadata to discover: folders with `.dist-info` and modules, written as pip would leave them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mm_registry import PluginManager

GROUP = "mm_core.predictor_models"


@dataclass
class Site:
    """A folder on the path, like `site-packages`."""

    root: Path
    distributions: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        version: str = "1.0",
        entries: Mapping[str, Mapping[str, str]] | None = None,
        *,
        requires: Sequence[str] = (),
        direct_url: Mapping[str, Any] | None = None,
        modules: Mapping[str, str] | None = None,
        suffix: str = "dist-info",
    ) -> Path:
        """Install a distribution: `entries` is group -> id -> target, `modules` relative path -> source."""
        info = self.root / f"{name.replace('-', '_')}-{version}.{suffix}"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        filename = "METADATA" if suffix == "dist-info" else "PKG-INFO"
        (info / filename).write_text("\n".join(lines) + "\n\nA description.\n", encoding="utf-8")
        if entries:
            sections = (
                f"[{group}]\n" + "".join(f"{id} = {target}\n" for id, target in ids.items())
                for group, ids in entries.items()
            )
            (info / "entry_points.txt").write_text("\n".join(sections), encoding="utf-8")
        if direct_url is not None:
            (info / "direct_url.json").write_text(json.dumps(direct_url), encoding="utf-8")
        for path, source in (modules or {}).items():
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source, encoding="utf-8")
        self.distributions.append(name)
        return info

    def manager(self, **environ: str) -> PluginManager:
        """A manager that sees this folder alone, and no selection file."""
        return PluginManager([str(self.root)], environ=environ, environment_file=None, project_folder=None)


@pytest.fixture
def make_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Site]]:
    """Make folders on `sys.path`; the modules imported from them are forgotten after the test."""
    before = set(sys.modules)

    def make(name: str = "site") -> Site:
        root = tmp_path / name
        root.mkdir()
        monkeypatch.syspath_prepend(str(root))
        return Site(root)

    yield make
    for name in set(sys.modules) - before:
        origin = getattr(sys.modules[name], "__file__", None)
        if origin and Path(origin).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that Python looked for since the fixture was made, in order."""
    looked_for: list[str] = []

    class Spy:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            looked_for.append(name)

    monkeypatch.setattr(sys, "meta_path", [Spy(), *sys.meta_path])
    return looked_for
