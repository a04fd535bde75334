"""The sizes at which the conformance kit tries Qwen3-VL out. Torch-free data; nothing else reads it."""

from __future__ import annotations

from typing import Any

from mm_core.testing.example import Example

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 2],
}
_IDS = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
    "tie_word_embeddings": False,
}
# No side of an expert's matrix is as long as another: transformers tells them apart by their lengths. One layer is dense.
_EXPERTS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}


def _section(*, freeze_projector: bool) -> dict[str, Any]:
    return {
        "image_encoder": {
            "vision_encoder": {"freeze": False},
            "vision_projector": {"freeze": freeze_projector},
        },
        "text_decoder": {"freeze": False},
    }


QWEN3_VL = Example(
    _section(freeze_projector=True),
    config={"model_type": "qwen3_vl", "text_config": _TEXT, "vision_config": _VISION, **_IDS},
    pixels=16 * 16,
)
QWEN3_VL_MOE = Example(
    _section(freeze_projector=False),
    config={
        "model_type": "qwen3_vl_moe",
        "text_config": {**_TEXT, **_EXPERTS},
        "vision_config": _VISION,
        **_IDS,
    },
    pixels=16 * 16,
)
