"""The sizes at which the conformance kit tries Wan's components out. Torch-free data; nothing else reads it."""

from __future__ import annotations

from mm_core.testing.example import Example

WANDIT = Example(
    {
        "init": "random",
        "patch_size": [1, 2, 2],
        "text_len": 8,
        "in_dim": 4,
        "out_dim": 4,
        "hidden_size": 24,
        "num_heads": 2,
        "ffn_dim": 32,
        "freq_dim": 16,
        "text_dim": 12,
        "num_layers": 2,
        "max_seq_len": 32,
    },
    latents=(4, 2, 4, 6),
    prompt=(8, 12),
)
WAN_FLOW_MATCH_SCHEDULER = Example({"shift": 5.0, "guidance_scale": 4.0}, latents=(4, 2, 4, 6))
WAN_VIDEO_VAE = Example(
    {
        "init": "random",
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [True],
        "latents_mean": [0.1, -0.2, 0.0, 0.3],
        "latents_std": [1.0, 1.5, 0.5, 2.0],
    },
    video=(5, 16, 24),
)
WAN_PIPELINE = Example({"input_size": [5, 16, 24]})
WAN_I2V_PROCESSOR = Example({"last_frame": True})
WAN_TI2V_PROCESSOR = Example()
