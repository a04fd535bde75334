"""What importing and asking the registry costs: none of the heavy libraries, and nothing of a plugin."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import mm_registry

PROBE = """
import json, sys
import mm_registry
after_import = sorted(sys.modules)
manager = mm_registry.PluginManager()
entries = [(spec.group, spec.id) for spec in manager.discover().entries]
manager.activate([])
try:
    mm_registry.Registry("mm_core.predictor_models", manager)["wandti"]
except mm_registry.UnknownIdError:
    pass
json.dump([after_import, sorted(sys.modules), entries], sys.stdout)
"""


def test_heavy_libraries_stay_out() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60
    )
    after_import, at_the_end, entries = json.loads(run.stdout)
    tops = {name.partition(".")[0] for name in at_the_end}
    assert entries
    assert not {"torch", "transformers", "diffusers", "numpy", "pydantic", "mm_core"} & tops
    assert not [name for name in tops if name.startswith("mm_plugin")]
    assert not {"pluggy", "importlib_metadata", "packaging"} & {
        name.partition(".")[0] for name in after_import
    }


def test_dependencies_are_the_declared_ones() -> None:
    allowed = {*sys.stdlib_module_names, "mm_registry", "importlib_metadata", "packaging", "pluggy"}
    files = sorted(Path(mm_registry.__file__).parent.glob("*.py"))
    assert len(files) > 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] in allowed, f"{file.name} imports {name}"


def test_exported_names_exist() -> None:
    for name in mm_registry.__all__:
        assert getattr(mm_registry, name) is not None
    assert not hasattr(mm_registry, "nothing")
