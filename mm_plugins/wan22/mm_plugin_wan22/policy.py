"""How Wan's transformer is sharded. Torch-free data; `fsdp2.yaml` may override each field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mm_core.sharding.context_policy import ContextPolicy
from mm_core.sharding.policy import PipelinePolicy, ShardingPolicy
from mm_plugin_wan22.variants import IMAGE_EMBEDDED

# MindSpeed-MM's module names, as its fsdp2.yaml files and LoRA targets use them. Longer paths win over their
# prefixes.
ALIASES = {
    "text_embedding": "condition_embedder.text_embedder",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_embedding": "condition_embedder.time_embedder",
    "time_projection.1": "condition_embedder.time_proj",
    "time_projection": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head": "proj_out",
    "blocks.{*}.self_attn.proj_q": "blocks.{*}.attn1.to_q",
    "blocks.{*}.self_attn.proj_k": "blocks.{*}.attn1.to_k",
    "blocks.{*}.self_attn.proj_v": "blocks.{*}.attn1.to_v",
    "blocks.{*}.self_attn.proj_out": "blocks.{*}.attn1.to_out.0",
    "blocks.{*}.self_attn.q_norm": "blocks.{*}.attn1.norm_q",
    "blocks.{*}.self_attn.k_norm": "blocks.{*}.attn1.norm_k",
    "blocks.{*}.self_attn": "blocks.{*}.attn1",
    "blocks.{*}.cross_attn.proj_q": "blocks.{*}.attn2.to_q",
    "blocks.{*}.cross_attn.proj_k": "blocks.{*}.attn2.to_k",
    "blocks.{*}.cross_attn.proj_v": "blocks.{*}.attn2.to_v",
    "blocks.{*}.cross_attn.proj_out": "blocks.{*}.attn2.to_out.0",
    "blocks.{*}.cross_attn.q_norm": "blocks.{*}.attn2.norm_q",
    "blocks.{*}.cross_attn.k_norm": "blocks.{*}.attn2.norm_k",
    "blocks.{*}.cross_attn": "blocks.{*}.attn2",
    "blocks.{*}.ffn.0": "blocks.{*}.ffn.net.0.proj",
    "blocks.{*}.ffn.2": "blocks.{*}.ffn.net.2",
}
# MindSpeed-MM's `norm3` of a block is diffusers' `norm2`. It is not an alias: `norm3` is also a name of
# diffusers' own block.
#: More of them in Wan2.1's models of type i2v and flf2v.
IMAGE_ALIASES = {
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb": "condition_embedder.image_embedder",
    "blocks.{*}.cross_attn.k_img": "blocks.{*}.attn2.add_k_proj",
    "blocks.{*}.cross_attn.v_img": "blocks.{*}.attn2.add_v_proj",
    "blocks.{*}.cross_attn.k_norm_img": "blocks.{*}.attn2.norm_added_k",
}

CONTEXT = ContextPolicy(
    attention=("blocks.{*}.attn1",),
    split_inputs={
        "blocks.0": {"hidden_states": 1},
    },
    split_outputs={
        "rope": 1,  # both tables are [1, S, 1, D]
        "token_timesteps": 1,  # one a token, or [B], which stays whole
    },
    gather_outputs={"proj_out": 1},
)
"""Tokens are split after the patch embedding and gathered before they become a video again; the text, and CLIP's features
of images, stay whole.
"""

WANDIT = ShardingPolicy(
    units=("blocks.{*}",),
    aligned=tuple(
        f"blocks.{{*}}.{attention}.{norm}"
        for attention in ("attn1", "attn2")
        for norm in ("norm_q", "norm_k")
    ),
    aliases=ALIASES,
    context=CONTEXT,
    pipeline=PipelinePolicy(
        blocks="blocks",
        first=("patch_embedding", "condition_embedder"),
        last=("scale_shift_table", "proj_out"),
    ),
)
"""What holds for every section."""


def wandit(section: Mapping[str, Any]) -> ShardingPolicy:
    """The policy of a `predictor` section, with what its keys say of activations.

    `attention_async_offload` offloads what both attentions of a block save; of blocks that are recomputed, which save
    nothing else, their inputs, as MindSpeed-MM does.

    Args:
        section: `predictor` of model.json, checked; absent keys have their defaults.
    """
    policy = WANDIT
    if section.get("model_type") in IMAGE_EMBEDDED:
        policy = replace(
            policy,
            aligned=(*policy.aligned, "blocks.{*}.attn2.norm_added_k"),
            aliases={**ALIASES, **IMAGE_ALIASES},
        )
    if section.get("recompute_granularity"):
        block = section.get("recompute_method") == "block"
        policy = replace(
            policy,
            recompute=policy.units,
            recompute_granularity=section["recompute_granularity"],
            recompute_num_layers=section["recompute_num_layers"] if block else None,
        )
    if section.get("attention_async_offload"):
        policy = replace(policy, offload_activations=("blocks.{*}.attn1", "blocks.{*}.attn2"))
    return policy
