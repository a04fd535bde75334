"""Wheels of our distributions, and fresh virtual environments to install them in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Distribution -> folder of its pyproject.toml.
SOURCES = {
    "mmzoo-registry": ROOT / "registry",
    "mmzoo-core": ROOT,
    "mmzoo-plugin-wan22": ROOT / "mm_plugins" / "wan22",
    "mmzoo-plugin-haar": ROOT / "examples" / "plugins" / "mmzoo-plugin-haar",
    "mmzoo-plugin-ltx": ROOT / "examples" / "plugins" / "mmzoo-plugin-ltx",
}
PACKAGES = {
    "mmzoo-registry": "mm_registry",
    "mmzoo-core": "mm_core",
    "mmzoo-plugin-wan22": "mm_plugin_wan22",
    "mmzoo-plugin-haar": "mm_plugin_haar",
    "mmzoo-plugin-ltx": "mm_plugin_ltx",
}


def run(command: list[str | Path], **options: Any) -> str:
    """Run a command without this process's Python settings and return what it printed."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MM_", "PIP_"))}
    arguments = [str(part) for part in command]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=240, env=env, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def sources() -> dict[str, Path]:
    return SOURCES


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build each wheel from a copy of its files, so that no build folder of the tree takes part."""
    copies = tmp_path_factory.mktemp("sources")
    folders: list[Path] = []
    for name, folder in SOURCES.items():
        copy = copies / name
        copy.mkdir()
        for pattern in ("pyproject.toml", "README.md", "LICENSE"):
            for file in folder.glob(pattern):
                shutil.copy(file, copy)
        package = PACKAGES[name]
        shutil.copytree(folder / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        folders.append(copy)
    built = tmp_path_factory.mktemp("wheels")
    options: list[str | Path] = ["--no-deps", "--no-build-isolation", "--no-index", "-w", built]
    run([sys.executable, "-m", "pip", "wheel", *options, *folders], cwd=copies)
    found = {path.name.split("-")[0].replace("_", "-"): path for path in built.glob("*.whl")}
    assert set(found) == set(SOURCES)
    return found


@dataclass
class Environment:
    """A virtual environment that sees this one's third-party packages, and none of our distributions."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    def pip(self, *arguments: str | Path) -> None:
        run([sys.executable, "-m", "pip", "--python", self.python, "-q", *arguments], cwd=self.root)

    def install(self, *wheels: Path) -> None:
        self.pip("install", "--no-deps", "--no-index", *wheels)

    def evaluate(self, source: str) -> Any:
        """Run a script whose last act is `show(value)`, in a fresh process, and return the value."""
        show = "import json, sys\ndef show(value):\n    json.dump(value, sys.stdout)\n"
        # -I: neither the working directory nor any setting may lend the script our source tree.
        return json.loads(run([self.python, "-I", "-c", show + source], cwd=self.root))


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """Make an environment with the given wheels installed by pip."""

    def make(*wheels: Path) -> Environment:
        folder = tmp_path_factory.mktemp("environment")
        environment = Environment(folder / "venv")
        run([sys.executable, "-m", "venv", "--without-pip", environment.root])
        (site,) = environment.root.glob("lib/python*/site-packages")
        # The parent's site-packages itself would bring our editable installs along.
        third_party = folder / "third-party"
        third_party.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            ours = entry.name.lower().startswith(("mmzoo", "__editable__", "mm_"))
            if not ours and entry.suffix != ".pth" and entry.name != "__pycache__":
                (third_party / entry.name).symlink_to(entry)
        (site / "third_party.pth").write_text(f"{third_party}\n")
        environment.install(*wheels)
        return environment

    return make


@pytest.fixture(scope="session")
def installed(make_environment: Callable[..., Environment], wheels: dict[str, Path]) -> Environment:
    """An environment with all our wheels, not to be changed."""
    return make_environment(*wheels.values())
