"""The sizes at which the kit tries the core's own components out. Torch-free data."""

from __future__ import annotations

from typing import Any

from mm_core.testing.example import Example

_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "pad_token_id": 0,
}
_CLIP: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = Example({"init": "random", "config": _T5}, tokens=8)
CLIP = Example({"init": "random", "config": _CLIP}, tokens=8)
CLIP_WITH_PROJECTION = Example(
    {"init": "random", "config": _CLIP, "output_key": "last_hidden_state"}, tokens=8
)
SAMPLER = Example({"num_train_timesteps": 1000, "num_inference_steps": 4}, latents=(4, 2, 4, 4))
