"""How Qwen3-VL is sharded. Torch-free data; `fsdp2.yaml` may override each field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_core.config.document import expanded
from mm_core.config.latents import read_hf_config
from mm_core.sharding.context_policy import DealtItems, causal_text
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

CONTEXT = causal_text(
    _TEXT,
    # DeepStack: the first layers add features to the tokens of images and videos.
    marked={"deepstack_visual_embeds": "visual_pos_masks"},
    # Frames do not see each other in the vision tower.
    dealt={_VISION: DealtItems("hidden_states", "grid_thw", outputs=("pooler_output", "deepstack_features"))},
)

# Attention of the vision tower stays whole: one matrix makes its queries, keys and values.
TENSOR = {
    f"{_VISION}.blocks.{{*}}.mlp.linear_fc1": "colwise",
    f"{_VISION}.blocks.{{*}}.mlp.linear_fc2": "rowwise",
    **{
        f"{_VISION}.{merger}.{layer}": style
        for merger in ("merger", "deepstack_merger_list.{*}")
        for layer, style in (("linear_fc1", "colwise"), ("linear_fc2", "rowwise"))
    },
}
"""What is cut beside transformers' own plan, which has the layers of the models with experts."""
DENSE_TENSOR = {
    **{f"{_TEXT}.layers.{{*}}.self_attn.{name}_proj": "colwise" for name in "qkv"},
    f"{_TEXT}.layers.{{*}}.self_attn.o_proj": "rowwise",
    **{f"{_TEXT}.layers.{{*}}.mlp.{name}_proj": "colwise" for name in ("gate", "up")},
    f"{_TEXT}.layers.{{*}}.mlp.down_proj": "rowwise",
}
"""As transformers' plan of Qwen3, which that of the dense Qwen3-VL lacks."""


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
    mixed = f"{_TEXT}.layers.{_layers_with_experts(section)}.mlp"
    gates = (f"{mixed}.gate",) if experts else ()
    return ShardingPolicy(
        units=(*vision, f"{_VISION}.merger", f"{_TEXT}.embed_tokens", text, "lm_head"),
        # The backward pass begins with the head.
        keep_gathered=("lm_head",),
        recompute=(f"{_VISION}.blocks.{{*}}", text),
        offload_activations=(text,) if section.get("text_decoder", {}).get("activation_offload") else (),
        experts=(f"{mixed}.experts",) if experts else (),
        aligned=(*_NORMS, *gates, f"{_TEXT}.norm"),
        aliases=ALIASES,
        joint_vision=("model",),
        tensor=TENSOR if experts else {**TENSOR, **DENSE_TENSOR},
        context=CONTEXT,
    )


def _layers_with_experts(section: Mapping[str, Any]) -> str:
    """The index pattern of the layers that are no dense ones, as transformers tells them apart."""
    config = _hf_config(section).get("text_config", {})
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    layers = range(config.get("num_hidden_layers", 0))
    mixed = [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]
    return "{*}" if len(mixed) in (0, len(layers)) else "{" + ",".join(map(str, mixed)) + "}"


def _hf_config(section: Mapping[str, Any]) -> Mapping[str, Any]:
    return read_hf_config(expanded(str(section.get("init_from_hf_path") or "")))


def _vision(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Vision blocks and deepstack mergers in the order in which they run: prefetching follows it."""
    config = _hf_config(section).get("vision_config", {})
    depth, merged = config.get("depth", 27), config.get("deepstack_visual_indexes", DEEPSTACK)
    units: list[str] = []
    for block in range(depth):
        units.append(f"{_VISION}.blocks.{block}")
        if block in merged:
            units.append(f"{_VISION}.deepstack_merger_list.{list(merged).index(block)}")
    return tuple(units)
