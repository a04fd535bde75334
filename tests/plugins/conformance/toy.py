"""The toy plugin as a distribution that can be broken in one place: files, entry points and metadata as data."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from toy_site import DISTRIBUTION, ENTRY_POINTS, PACKAGE, SOURCES

from mm_registry import reset_default_manager

VERSION = "1.0"
REQUIRES = ("mmzoo-core>=0.1,<0.2", "mmzoo-registry>=0.1,<0.2")
HEADER = {
    "Summary": "A toy.",
    "License-Expression": "Apache-2.0",
    "Requires-Python": ">=3.11",
    "Description-Content-Type": "text/markdown",
}
HOOKS = '''\
"""Fills the number of layers, and marks what is built."""

from mm_registry.hooks import ConfigPatch, hookimpl


@hookimpl
def overwrite_config(role, model_id, config):
    if (role, model_id) != ("predictor", "toy_dit") or "num_layers" in config:
        return None
    return ConfigPatch({"num_layers": 2}, reason="two layers are enough for a toy")


@hookimpl
def post_build(role, model_id, model):
    if (role, model_id) == ("predictor", "toy_dit"):
        model.prepared = True
'''


@dataclass
class Toy:
    """What is to be written; change it, then `write` it.

    Attributes:
        files: path inside the package's folder -> text.
        entries: group -> name -> value.
        loose: path beside the package -> text (a `.pth` file, another distribution's metadata).
        unrecorded: paths of `files` and `loose` that RECORD leaves out.
        header: fields of METADATA after name and version.
    """

    files: dict[str, str] = field(default_factory=dict)
    entries: dict[str, dict[str, str]] = field(default_factory=dict)
    loose: dict[str, str] = field(default_factory=dict)
    unrecorded: set[str] = field(default_factory=set)
    requires: list[str] = field(default_factory=lambda: list(REQUIRES))
    header: dict[str, str] = field(default_factory=lambda: dict(HEADER))
    readme: str = "# A toy\n"

    def replace(self, file: str, old: str, new: str) -> None:
        """Replace a text that must occur exactly once."""
        assert self.files[file].count(old) == 1, (
            f"{old!r} occurs {self.files[file].count(old)} times in {file}"
        )
        self.files[file] = self.files[file].replace(old, new)

    def prepend(self, file: str, text: str) -> None:
        """Put statements at a module's top, after its docstring's and `__future__` lines."""
        marker = "from __future__ import annotations\n"
        if marker in self.files[file]:
            self.replace(file, marker, f"{marker}\n{text}\n")
        else:
            self.files[file] = f"{text}\n{self.files[file]}"

    def write(self, site: Path) -> None:
        """Write everything as an installation would leave it."""
        info = f"{PACKAGE.replace('mm_plugin', 'mmzoo_plugin')}-{VERSION}.dist-info"
        metadata = {"Metadata-Version": "2.4", "Name": DISTRIBUTION, "Version": VERSION, **self.header}
        lines = [f"{name}: {value}" for name, value in metadata.items()]
        lines += [f"Requires-Dist: {line}" for line in self.requires]
        points = [
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in names.items())
            for group, names in self.entries.items()
        ]
        written = {
            **{f"{PACKAGE}/{name}": text for name, text in self.files.items()},
            **self.loose,
            f"{info}/METADATA": "\n".join(lines) + f"\n\n{self.readme}",
            f"{info}/entry_points.txt": "\n".join(points),
        }
        own = [name for name in written if name not in self.unrecorded]
        written[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*own, f"{info}/RECORD"])
        for name, text in written.items():
            file = site / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")


def good_toy() -> Toy:
    """The toy as it should be, with a hook that overwrites, an old id and a dropped one."""
    files = {file.name: file.read_text(encoding="utf-8") for file in SOURCES.glob("*.py")}
    files["hooks.py"] = HOOKS
    entries: dict[str, dict[str, str]] = {}
    for line in ENTRY_POINTS.splitlines():
        if line.startswith("["):
            names = entries.setdefault(line.strip("[]"), {})
        else:
            name, _, value = line.partition(" = ")
            names[name] = value
    entries["mm_core.aliases"] = {"predictor/toy_transformer": "toy_dit"}
    entries["mm_core.farewells"] = {"predictor/toy_unet": "0.3"}
    return Toy(files, entries)


@contextmanager
def installed(toy: Toy, site: Path) -> Iterator[None]:
    """Have the toy written and on `sys.path` for a while; what is imported from it is forgotten afterwards."""
    toy.write(site)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    reset_default_manager()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        reset_default_manager()
