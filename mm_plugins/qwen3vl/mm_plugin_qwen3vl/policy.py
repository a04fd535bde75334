"""How Qwen3-VL is sharded. Torch-free data; `fsdp2.yaml` may override each field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_core.config.document import expanded
from mm_core.config.latents import read_hf_config
from mm_core.sharding.context_policy import causal_text
from mm_core.sharding.policy import ShardingPolicy

_VISION, _TEXT = "model.visual", "model.language_model"
# Files of MindSpeed-MM name modules as seen from the network, `model.language_model.layers.{*}`; here the network is called
# `model` itself, and these are its parts.
ALIASES = {"language_model": _TEXT, "visual": _VISION}
DEEPSTACK = (8, 16, 24)
"""Vision blocks after which a deepstack merger runs, in the 8B, 32B, 30B-A3B and 235B-A22B models."""
_NORMS = (
    f"{_TEXT}.layers.{{*}}.input_layernorm",
    f"{_TEXT}.layers.{{*}}.post_attention_layernorm",
    f"{_TEXT}.layers.{{*}}.self_attn.q_norm",
    f"{_TEXT}.layers.{{*}}.self_attn.k_norm",
)


def qwen3_vl(section: Mapping[str, Any]) -> ShardingPolicy:
    """The policy of the dense models.

    Args:
        section: the model file, checked; `config.json` of its folder says after which vision blocks deepstack mergers
            run.
    """
    return _policy(section, experts=False)


def qwen3_vl_moe(section: Mapping[str, Any]) -> ShardingPolicy:
    """The policy of the models with experts; `section` as for the dense ones."""
    return _policy(section, experts=True)


def _policy(section: Mapping[str, Any], *, experts: bool) -> ShardingPolicy:
    vision, text = _vision(section), f"{_TEXT}.layers.{{*}}"
    gates = (f"{text}.mlp.gate",) if experts else ()
    return ShardingPolicy(
        units=(f"{_TEXT}.embed_tokens", *vision, f"{_VISION}.merger", text, "lm_head"),
        # The backward pass begins with the head.
        keep_gathered=("lm_head",),
        recompute=(f"{_VISION}.blocks.{{*}}", text),
        experts=(f"{text}.mlp.experts",) if experts else (),
        aligned=(*_NORMS, *gates, f"{_TEXT}.norm"),
        aliases=ALIASES,
        context=causal_text(_TEXT, unsupported=("pixel_values", "pixel_values_videos")),
    )


def _vision(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Vision blocks and deepstack mergers in the order in which they run: prefetching follows it."""
    config = read_hf_config(expanded(str(section.get("init_from_hf_path") or ""))).get("vision_config", {})
    depth, merged = config.get("depth", 27), config.get("deepstack_visual_indexes", DEEPSTACK)
    units: list[str] = []
    for block in range(depth):
        units.append(f"{_VISION}.blocks.{block}")
        if block in merged:
            units.append(f"{_VISION}.deepstack_merger_list.{list(merged).index(block)}")
    return tuple(units)
