"""Tiny sections that `mm plugin check` and the conformance kit build and run. Torch-free."""

from __future__ import annotations

from mm_core.testing import Example

PREDICTOR = Example(
    section={
        "init": "random",
        "in_dim": 8,
        "out_dim": 8,
        "num_heads": 2,
        "head_dim": 16,
        "num_layers": 2,
        "text_dim": 12,
        "temporal_compression": 8,
        "spatial_compression": 16,
    },
    latents=(8, 2, 4, 4),
    prompt=(6, 12),
)
DIFFUSION = Example(section={"num_inference_timesteps": 4}, latents=(8, 2, 4, 4))
AUTOENCODER = Example(
    section={
        "init": "random",
        "latent_channels": 8,
        "block_out_channels": [8, 8, 16, 16],
        "layers_per_block": [1, 1, 1, 1, 1],
        "patch_size": 2,
    },
    video=(9, 32, 32),
)
PIPELINE = Example(section={"input_size": [9, 32, 32]})
