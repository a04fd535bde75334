"""The reference page is what the classes say, and says everything."""

from __future__ import annotations

from pathlib import Path

from mm_core.config.environment import VARIABLES
from mm_core.config.flag_help import flag_name
from mm_core.config.flags import TrainFlags
from mm_core.config.kinds import CLASSES
from mm_core.config.reference import reference
from mm_registry import PluginManager

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration-reference.md"


def test_the_page_is_up_to_date() -> None:
    """`make generated` writes it."""
    assert PAGE.read_text(encoding="utf-8") == reference(manager=PluginManager())


def test_every_key_flag_and_variable_is_on_it_with_a_meaning() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {line.split("`")[1] for line in rows}
    for cls in CLASSES.values():
        assert set(cls.model_fields) <= named
    assert {flag_name(name) for name in TrainFlags.model_fields} <= named
    assert {variable.name for variable in VARIABLES} <= named
    assert {"shift", "qk_norm_type", "hidden_state_skip_layer", "cutoff_len", "freeze"} <= named
    silent = [line for line in rows if line.rstrip("| ").endswith(("–", "`"))]
    assert silent == []
