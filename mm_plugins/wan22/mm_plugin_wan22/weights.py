"""What folders of weights and checkpoints of others call the tensors and settings of Wan's transformer. Torch-free.

The module's own names are those of diffusers, and so are a published folder's (`Wan-AI/…-Diffusers`). MindSpeed-MM
has names of its own, in the files that its converter and its training write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mm_plugin_wan22.variants import CLIP_TOKENS, IMAGE_EMBEDDED

#: Our name of what diffusers' config.json says.
OUR_NAMES = {
    "num_attention_heads": "num_heads",
    "attention_head_dim": "hidden_size / num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "image_dim": "img_dim",
    "added_kv_proj_dim": "model_type",
    "pos_embed_seq_len": "2 * clip_token_len",
}
_IMAGE_DIM = 1280

# MindSpeed-MM's name of a module, or of a parameter -> diffusers'.
_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.linear_1": "condition_embedder.text_embedder.linear_1",
    "text_embedding.linear_2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_ATTENTION = {
    "proj_q": "to_q",
    "proj_k": "to_k",
    "proj_v": "to_v",
    "proj_out": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_BLOCK = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.k_norm_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}
_IN_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")
_LEAF = re.compile(r"(.+)\.(weight|bias)")


def diffusers_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a predictor's section into the arguments of diffusers' WanTransformer3DModel."""
    with_image = fields["model_type"] in IMAGE_EMBEDDED
    image_dim = fields.get("img_dim", _IMAGE_DIM)
    tokens = 2 * fields.get("clip_token_len", CLIP_TOKENS) if fields["model_type"] == "flf2v" else None
    return {
        "patch_size": list(fields["patch_size"]),
        "num_attention_heads": fields["num_heads"],
        "attention_head_dim": fields["hidden_size"] // fields["num_heads"],
        "in_channels": fields["in_dim"],
        "out_channels": fields["out_dim"],
        "text_dim": fields["text_dim"],
        "freq_dim": fields["freq_dim"],
        "ffn_dim": fields["ffn_dim"],
        "num_layers": fields["num_layers"],
        "cross_attn_norm": fields["cross_attn_norm"],
        "qk_norm": "rms_norm_across_heads",
        "eps": fields["eps"],
        "image_dim": image_dim if with_image else None,
        "added_kv_proj_dim": fields["hidden_size"] if with_image else None,
        "rope_max_seq_len": fields["max_seq_len"],
        "pos_embed_seq_len": tokens,
    }


def config_differences(ours: Mapping[str, Any], folder: Mapping[str, Any]) -> list[str]:
    """Say what a folder's config.json describes otherwise than diffusers' arguments `ours`, in their names and in ours.

    The length of the rotary table may differ, since the table is computed.
    """
    differences = []
    for name, value in ours.items():
        if name.startswith("_") or name == "rope_max_seq_len" or name not in folder:
            continue
        here, there = (list(v) if isinstance(v, tuple) else v for v in (value, folder[name]))
        if here != there:
            alias = f" (our {OUR_NAMES[name]})" if name in OUR_NAMES else ""
            differences.append(f"{name} is {there} there and {here} here{alias}")
    return differences


class WanDiTWeights:
    """The weights adapter of `predictor/wandit`. A folder's keys are the module's."""

    def to_module(self, key: str) -> str:
        """Return the module's name of a tensor: the folder's."""
        return key

    def to_folder(self, key: str) -> str:
        """Return the folder's name of a tensor: the module's."""
        return key

    def config_to_folder(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return diffusers' config.json of a section."""
        return {"_class_name": "WanTransformer3DModel", **diffusers_config(fields)}

    def config_problems(self, config: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
        """Say what a folder's config.json describes otherwise than the section."""
        return config_differences(diffusers_config(fields), config)

    def from_foreign(self, keys: Iterable[str]) -> Mapping[str, str]:
        """Return the module's names of the tensors in a checkpoint of MindSpeed-MM, which may stand below `predictor.`;
        names that are not MindSpeed-MM's stay.
        """
        return {key: _from_mindspeed(key.removeprefix("predictor.")) for key in keys}


WANDIT = WanDiTWeights()


def _from_mindspeed(key: str) -> str:
    block = _IN_BLOCK.fullmatch(key)
    before, name, names = (f"{block[1]}.", block[2], _BLOCK) if block else ("", key, _TOP)
    if name in names:
        return before + names[name]
    leaf = _LEAF.fullmatch(name)
    if leaf and leaf[1] in names:
        return f"{before}{names[leaf[1]]}.{leaf[2]}"
    return key
