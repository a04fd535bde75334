"""How LTX-Video's transformer is sharded. Torch-free data; `fsdp2.yaml` may override each field."""

from __future__ import annotations

from mm_core.sharding.policy import ShardingPolicy

# Lightricks' module names, as LoRA targets and ComfyUI workflows use them.
ALIASES = {
    "patchify_proj": "proj_in",
    "adaln_single": "time_embed",
    "transformer_blocks.{*}.attn1.q_norm": "transformer_blocks.{*}.attn1.norm_q",
    "transformer_blocks.{*}.attn1.k_norm": "transformer_blocks.{*}.attn1.norm_k",
    "transformer_blocks.{*}.attn2.q_norm": "transformer_blocks.{*}.attn2.norm_q",
    "transformer_blocks.{*}.attn2.k_norm": "transformer_blocks.{*}.attn2.norm_k",
}

LTX_DIT = ShardingPolicy(
    units=("transformer_blocks.{*}",), aliases=ALIASES, fp32_inputs=("timestep", "frame_rate")
)
