"""Sizes of the tiny parts that the tests of this folder are built from."""

from __future__ import annotations

from typing import Any

TINY_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "text_len": 16,
    "in_dim": 16,
    "out_dim": 16,
    "hidden_size": 96,
    "num_heads": 3,
    "ffn_dim": 160,
    "freq_dim": 32,
    "text_dim": 24,
    "num_layers": 2,
    "max_seq_len": 64,
}
TINY_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.1,
    "feed_forward_proj": "gated-gelu",
}
TINY_VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}

# What the other types of model have of their own.
TYPES: dict[str, dict[str, Any]] = {
    "t2v": {},
    "wan2.2-i2v": {"model_type": "wan2.2-i2v", "in_dim": 36},
    "i2v": {"model_type": "i2v", "in_dim": 36, "text_len": 512, "img_dim": 20},
    "flf2v": {"model_type": "flf2v", "in_dim": 36, "text_len": 512, "img_dim": 20},
    "ti2v": {"model_type": "ti2v"},
}
