"""docs/sharding.md: what its files and its policy do, and the table that it reads line by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, run_mm
from tests.e2e.pages import blocks, titled

pytestmark = pytest.mark.timeout(240)

PAGE = ROOT / "docs/sharding.md"


def check(tmp_path: Path, file: str) -> str:
    """The output of the page's command, with one of its files."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / file).write_text(titled(PAGE, file), encoding="utf-8")
    (command,) = (line for block in blocks(PAGE) for line in block.commands)
    words = [file if word == "fsdp2.yaml" else word for word in command.split()[1:]]
    return run_mm(*words, cwd=tmp_path).out


def test_the_table_on_the_page_is_what_the_command_prints(tmp_path: Path) -> None:
    assert titled(PAGE, "the table") in check(tmp_path, "fsdp2.yaml")


def test_the_errors_on_the_page_are_those_of_its_file(tmp_path: Path) -> None:
    errors = [line for line in check(tmp_path, "wrong.yaml").splitlines() if "error:" in line]
    assert errors == titled(PAGE, "mm check ... wrong.yaml").splitlines()


def test_the_patterns_and_the_policy_on_the_page_fit_wan() -> None:
    import torch

    from mm_core.config.fsdp2 import Fsdp2Config
    from mm_core.sharding import ShardingPolicy, build_plan
    from mm_plugin_wan22.policy import ALIASES
    from mm_plugin_wan22.predictor import WanDiT

    with torch.device("meta"):
        model = WanDiT(hidden_size=64, num_heads=4, num_layers=30, ffn_dim=64, text_dim=32, freq_dim=32)
    names: dict[str, ShardingPolicy] = {}
    exec(titled(PAGE, "policy.py"), names)
    plan = build_plan(model, names["POLICY"], Fsdp2Config())
    assert [unit.path for unit in plan.units] == [*(f"blocks.{i}" for i in range(30)), "proj_out"]
    wan = ShardingPolicy(aliases=ALIASES)
    for pattern in ("predictor.blocks.{*}", "predictor.blocks.{0-23}", "predictor.blocks.{1,3,5-7}",
                    "predictor.blocks.*.attn?", "WanTransformerBlock",
                    "diffusers.models.transformers.transformer_wan.WanTransformerBlock"):  # fmt: skip
        assert f"`{pattern}`" in PAGE.read_text(encoding="utf-8")
        assert build_plan(model, wan, Fsdp2Config(sub_modules_to_wrap=(pattern,))).units
