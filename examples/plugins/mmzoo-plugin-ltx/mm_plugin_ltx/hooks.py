"""What the plugin derives from a section before it is checked. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_plugin_ltx.config import LTXDiTConfig
from mm_registry.hooks import ConfigPatch, hookimpl


@hookimpl
def overwrite_config(role: str, model_id: str, config: Mapping[str, Any]) -> ConfigPatch | None:
    """Fill `cross_attention_dim` of `ltx_dit`, so that a run's record says it as diffusers' files do."""
    if (role, model_id) != ("predictor", "ltx_dit") or config.get("cross_attention_dim") is not None:
        return None
    sizes = [config.get(name, LTXDiTConfig.model_fields[name].default) for name in ("num_heads", "head_dim")]
    if not all(type(size) is int for size in sizes):
        return None  # the config class says what is wrong with them
    return ConfigPatch(
        {"cross_attention_dim": sizes[0] * sizes[1]},
        reason="captions are projected to the model's width, num_heads * head_dim",
    )
