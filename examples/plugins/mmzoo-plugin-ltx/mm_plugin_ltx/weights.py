"""What published folders call the transformer's tensors and settings. Torch-free.

There are two spellings: that of diffusers, which the module has, and that of Lightricks' own files, which
ComfyUI reads: https://github.com/Lightricks/LTX-Video. diffusers translates the second in
`diffusers.loaders.single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

_PREFIX = "model.diffusion_model."
_TO_DIFFUSERS = {
    "patchify_proj": "proj_in",
    "adaln_single": "time_embed",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_TO_LIGHTRICKS = {ours: theirs for theirs, ours in _TO_DIFFUSERS.items()}

# What no section chooses: published models have no others.
_FIXED = {
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "attention_out_bias": True,
}
_OUR_NAMES = {
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "caption_channels": "text_dim",
    "in_channels": "in_dim times the patch",
    "out_channels": "out_dim times the patch",
    "patch_size_t": "the first of patch_size",
}


def diffusers_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a predictor's section into the arguments of diffusers' LTXVideoTransformer3DModel.

    A token there is a whole patch, so its channels are those of the latents times the patch's volume.
    """
    frames, side, _ = fields["patch_size"]
    volume = prod(fields["patch_size"])
    return {
        "in_channels": fields["in_dim"] * volume,
        "out_channels": fields["out_dim"] * volume,
        "patch_size": side,
        "patch_size_t": frames,
        "num_attention_heads": fields["num_heads"],
        "attention_head_dim": fields["head_dim"],
        "cross_attention_dim": fields["num_heads"] * fields["head_dim"],
        "num_layers": fields["num_layers"],
        "norm_eps": fields["norm_eps"],
        "caption_channels": fields["text_dim"],
        **_FIXED,
    }


def config_differences(ours: Mapping[str, Any], folder: Mapping[str, Any]) -> list[str]:
    """Say what a folder's config.json describes otherwise than diffusers' arguments `ours`."""
    return [
        f"{name} is {folder[name]} there and {value} here"
        + (f" (our {_OUR_NAMES[name]})" if name in _OUR_NAMES else "")
        for name, value in ours.items()
        if name in folder and folder[name] != value
    ]


class LTXWeights:
    """Reads both spellings of the keys and writes one of them.

    Args:
        writes: `diffusers` or `lightricks`.
    """

    def __init__(self, writes: str = "diffusers") -> None:
        self.writes = writes

    def to_module(self, key: str) -> str:
        """Return the module's name of a tensor, whichever of the two spellings it has."""
        return _renamed(key.removeprefix(_PREFIX), _TO_DIFFUSERS)

    def to_folder(self, key: str) -> str:
        """Return the name of a tensor in a folder that is written."""
        return key if self.writes == "diffusers" else _PREFIX + _renamed(key, _TO_LIGHTRICKS)

    def config_to_folder(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return diffusers' config.json of a section."""
        return {"_class_name": "LTXVideoTransformer3DModel", **diffusers_config(fields)}

    def config_problems(self, config: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
        """Say what a folder's config.json describes otherwise than the section."""
        return config_differences(self.config_to_folder(fields), config)


def adapter(fields: Mapping[str, Any]) -> LTXWeights:
    """Return the adapter of a section."""
    return LTXWeights(fields["checkpoint_keys"])


def _renamed(key: str, names: Mapping[str, str]) -> str:
    return ".".join(names.get(part, part) for part in key.split("."))
