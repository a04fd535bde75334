"""Plugins that are installed for the tests of commands: real metadata, and packages whose import raises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Result, run_mm

API = ("mmzoo-core>=0.1,<0.2", "mmzoo-registry>=0.1,<0.2")
_NEVER = 'raise RuntimeError("a plugin was imported")\n'


@dataclass(frozen=True)
class Site:
    """A folder on the path with installed distributions, and an empty project to work in."""

    root: Path
    project: Path

    def add(
        self,
        name: str,
        entries: dict[str, dict[str, str]],
        *,
        requires: tuple[str, ...] = API,
        version: str = "1.0",
    ) -> Path:
        """Install a distribution as pip leaves it; importing its package raises."""
        info = self.root / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        text = "".join(
            f"[{group}]\n" + "".join(f"{id} = {target}\n" for id, target in ids.items())
            for group, ids in entries.items()
        )
        (info / "entry_points.txt").write_text(text, encoding="utf-8")
        package = self.root / name.replace("mmzoo-plugin-", "mm_plugin_")
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(_NEVER, encoding="utf-8")
        return info

    def clean(self) -> None:
        """Empty the project; nothing but files was to be left in it, and no temporary one."""
        for path in self.project.iterdir():
            assert path.is_file(), f"{path} was left"
            assert not path.name.startswith(".tmp-")
            path.unlink()

    def mm(self, *arguments: str | Path, **variables: str) -> Result:
        return run_mm(*arguments, cwd=self.project, PYTHONPATH=str(self.root), **variables)

    def json(self, *arguments: str | Path, **variables: str) -> Any:
        result = self.mm(*arguments, "--format", "json", **variables)
        assert result.out, result.err
        return json.loads(result.out)


def full_site(root: Path, project: Path) -> Site:
    """A plugin that declares all there is, one that declares the least, two that claim one id, one for another core."""
    made = Site(root, project)
    made.add(
        "mmzoo-plugin-acme",
        {
            "mm_core.predictor_models": {"acme_dit": "mm_plugin_acme:Dit", "acme_big": "mm_plugin_acme:Dit [big]"},
            "mm_core.ae_models": {"shared": "mm_plugin_acme:Ae"},
            "mm_core.configs": {"predictor/acme_dit": "mm_plugin_acme:C", "ae/shared": "mm_plugin_acme:A"},
            "mm_core.sharding_policies": {"predictor/acme_dit": "mm_plugin_acme:P"},
            "mm_core.weights": {"predictor/acme_dit": "mm_plugin_acme:W"},
            "mm_core.examples": {"predictor/acme_dit": "mm_plugin_acme:E"},
            "mm_core.aliases": {"predictor/acme_old": "acme_dit"},
            "mm_core.farewells": {"predictor/acme_gone": "v0_3"},
            "mm_core.hooks": {"acme": "mm_plugin_acme"},
        },
        requires=(*API, 'acme-kernels; extra == "big"'),
    )  # fmt: skip
    made.add(
        "mmzoo-plugin-bare", {"mm_core.predictor_models": {"bare_dit": "mm_plugin_bare:Dit"}}, requires=()
    )
    made.add(
        "mmzoo-plugin-rival",
        {
            "mm_core.ae_models": {"shared": "mm_plugin_rival:Ae"},
            "mm_core.configs": {"ae/shared": "mm_plugin_rival:A"},
        },
    )
    made.add(
        "mmzoo-plugin-future",
        {
            "mm_core.ae_models": {"future_ae": "mm_plugin_future:Ae"},
            "mm_core.configs": {"ae/future_ae": "mm_plugin_future:A"},
        },
        requires=("mmzoo-core>=9", "mmzoo-registry>=0.1,<0.2"),
    )
    return made
