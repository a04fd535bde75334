"""Adapters in PEFT's folders that would be computed otherwise than they were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_core.models.lora_weights import find_adapter_source
from mm_registry.errors import UserError

PLAIN = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "init_lora_weights": True,
}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, None),
        ({"init_lora_weights": "gaussian", "alpha_pattern": {}}, None),
        ({"alpha_pattern": {"q_proj": 32}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
        ({"use_rslora": True}, "not plain LoRA"),
    ],
)
def test_only_one_scale_on_unchanged_weights_is_taken(
    told: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, **told}))
    if message is None:
        config = find_adapter_source(tmp_path).config
        assert (config.rank, config.alpha) == (4, 8)
        return
    with pytest.raises(UserError, match=message):
        find_adapter_source(tmp_path)
