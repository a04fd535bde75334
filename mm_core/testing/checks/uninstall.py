"""Removing a plugin leaves nothing of it."""

from __future__ import annotations

from pathlib import Path

from mm_core.testing.case import Plugin
from mm_core.testing.check import CheckSkipped, check, require
from mm_core.testing.probes import after_uninstall, recorded_files

_MADE_BY_PYTHON = frozenset({".pyc", ".pyo"})


@check("uninstalling leaves no id behind", stage="metadata", whole_plugin=True)
def uninstall_leaves_no_ids(plugin: Plugin) -> None:
    """In a fresh process that sees everything but the plugin's recorded files, no entry of it is left, and asking for one
    of its ids says that nobody offers it.
    """
    remaining = plugin.folder / "uninstalled"
    remaining.mkdir()
    said = after_uninstall(plugin, remaining)
    require(not said["left"], f"still there: {', '.join(said['left'][:4])}")
    require(not said["wrong"], "; ".join(said["wrong"]))


@check("uninstalling leaves no file behind", stage="metadata", whole_plugin=True)
def uninstall_leaves_no_files(plugin: Plugin) -> None:
    """Every file of its packages is in the RECORD by which pip removes them."""
    files = recorded_files(plugin)
    if not files:
        raise CheckSkipped("its metadata has no RECORD of its files")
    location = Path(plugin.record.info).parent
    recorded = set(files)
    folders = {name.partition("/")[0] for name in files if "/" in name and not name.startswith("..")}
    strays = [
        str(file.relative_to(location))
        for folder in sorted(folders - {"__pycache__"})
        for file in sorted((location / folder).rglob("*"))
        if file.is_file() and file.suffix not in _MADE_BY_PYTHON
        if file.relative_to(location).as_posix() not in recorded
    ]
    require(not strays, f"not in its RECORD: {', '.join(strays[:4])}")
