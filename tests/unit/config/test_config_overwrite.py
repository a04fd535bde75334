"""Hooks overwrite sections by rules, and everything that they did is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mm_core.config import ConfigError, Document, load_training_job
from mm_core.config.json_reader import parse_json
from mm_core.config.overwrite import apply_patches
from mm_core.config.parts import Part
from mm_registry import ConfigPatch, PluginManager
from mm_registry.hooks import ProvidedPatch

PART = Part("predictor", "predictor", ("predictor",), ("predictor", "model_id"), "toy")


def document() -> Document:
    return parse_json('{"predictor": {"model_id": "toy",\n "layers": 4, "rope": {"theta": 1}}}', "m.json")


def patch(changes: dict[str, Any], *, by: str = "a", required: bool = False) -> ProvidedPatch:
    return ProvidedPatch(f"plugin-{by}", "1.0", ConfigPatch(changes, reason="because", required=required))


def test_a_hook_fills_what_is_not_written() -> None:
    changed, trace, findings = apply_patches(
        document(), PART, [patch({"heads": 8, "rope.scale": 2, "layers": 4})]
    )
    assert changed.data["predictor"] == {
        "model_id": "toy",
        "layers": 4,
        "heads": 8,
        "rope": {"theta": 1, "scale": 2},
    }
    assert [str(step) for step in trace] == [
        "predictor.heads: (not set) → 8, by plugin-a 1.0: because",
        "predictor.rope.scale: (not set) → 2, by plugin-a 1.0: because",
    ], "an equal value is no overwrite"
    assert findings == []
    assert str(changed.origin(("predictor", "heads"))) == "hook (plugin-a 1.0)"


def test_a_hook_against_the_user_is_an_error_unless_required() -> None:
    changed, trace, findings = apply_patches(document(), PART, [patch({"layers": 5})])
    assert changed.data["predictor"]["layers"] == 4
    assert trace == []
    assert [str(finding) for finding in findings] == [
        "m.json:2:12 error: 4 is written here, but plugin-a 1.0 wants 5: because. Write 5, or take "
        "the key out"
    ]
    changed, trace, findings = apply_patches(document(), PART, [patch({"layers": 5}, required=True)])
    assert changed.data["predictor"]["layers"] == 5
    assert (trace[0].old, trace[0].new) == (4, 5)
    assert [str(finding) for finding in findings] == [
        "m.json:2:12 note: 4 is replaced by 5, as plugin-a 1.0 requires: because"
    ]


def test_two_hooks_may_not_want_different_values() -> None:
    both = [patch({"heads": 8}), patch({"heads": 9}, by="b")]
    _, _, findings = apply_patches(document(), PART, both)
    assert [
        "two hooks want different values: 8 (plugin-a 1.0) and 9 (plugin-b 1.0)" in f.message
        for f in findings
    ] == [True]
    assert apply_patches(document(), PART, [patch({"heads": 8}), patch({"heads": 8}, by="b")])[2] == []
    for order in (1, -1):
        mixed = [patch({"heads": 8}), patch({"heads": 9}, by="b", required=True)][::order]
        changed, _, findings = apply_patches(document(), PART, mixed)
        assert (changed.data["predictor"]["heads"], findings) == (9, [])
    _, _, findings = apply_patches(document(), PART, [patch({"rope": {}}), patch({"rope.theta": 2}, by="b")])
    assert findings, "one writes inside what the other replaces"


def test_a_hook_may_neither_change_the_component_nor_write_into_a_scalar() -> None:
    _, _, findings = apply_patches(document(), PART, [patch({"model_id": "other"})])
    assert [finding.message for finding in findings] == ["a hook may not choose another component"]
    _, _, findings = apply_patches(document(), PART, [patch({"layers.first": 1})])
    assert [finding.message for finding in findings] == [
        "predictor.layers is no object, so nothing can be set in it"
    ]


HOOKS = """
from mm_registry import ConfigPatch, hookimpl

@hookimpl
def overwrite_config(role, model_id, config):
    if role == "diffusion":
        return ConfigPatch({"shift": %s}, reason="the schedule of this plugin")
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that installs a distribution with a hook into a folder of its own."""
    site = tmp_path / "site"

    def install(value: str) -> PluginManager:
        info = site / "shifty-1.2.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shifty\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text("[mm_core.hooks]\nhooks = shifty_hooks\n")
        (site / "shifty_hooks.py").write_text(HOOKS % value)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "shifty_hooks", raising=False)
        return PluginManager([str(site), *sys.path])

    return install


def test_hooks_of_a_named_plugin_take_part(files: Any, plugin: Any) -> None:
    manager = plugin("7.5")
    del files.model["diffusion"]["shift"]
    files.model["plugins"] = ["shifty"]
    files.write()
    job = load_training_job(files.flags(), manager=manager)
    assert job.components["diffusion"].fields["shift"] == 7.5
    assert job.model.diffusion["shift"] == 7.5
    assert ("shifty", "1.2") in job.plugins
    resolved = job.resolved()
    assert resolved["origins"]["model.diffusion.shift"] == "hook (shifty 1.2)"
    assert resolved["overwrites"][0]["path"] == "diffusion.shift"


def test_a_finding_on_a_patched_value_names_the_hook(files: Any, plugin: Any) -> None:
    manager = plugin("-1.0")
    del files.model["diffusion"]["shift"]
    files.model["plugins"] = ["shifty", "shfty"]
    files.write()
    with pytest.raises(ConfigError) as caught:
        load_training_job(files.flags(), manager=manager)
    text = str(caught.value)
    assert '"shift" is -1.0: must be greater than 0.0 (written by the hook (shifty 1.2))' in text
    assert "the distribution 'shfty' is not installed; did you mean 'shifty'?" in text


def test_a_digit_that_is_no_index_is_a_key() -> None:
    """`"²".isdigit()` holds, and `int("²")` raises."""
    from mm_core.config.overwrite import _keys

    assert _keys("a.2.²") == ["a", 2, "²"]
