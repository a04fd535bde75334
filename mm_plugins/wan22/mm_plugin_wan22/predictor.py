"""Wan's diffusion transformer under MindSpeed-MM's field names, computed by diffusers'
WanTransformer3DModel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.sharding.pipeline import StageCall
from mm_plugin_wan22.patch_embedding import LinearPatchEmbedding
from mm_plugin_wan22.stage import Travelling, boundary, run_stage
from mm_plugin_wan22.weights import config_differences
from mm_registry.errors import UserError

MODEL_TYPES = ("t2v", "wan2.2-t2v")


class WanDiT(WanTransformer3DModel):
    """The text-to-video transformer of Wan2.1 and Wan2.2 (Wan et al., "Wan: Open and Advanced Large-Scale
    Video Generative Models", 2025).

    State-dict keys, shapes, initial distributions and mathematics are those of
    `diffusers.WanTransformer3DModel`; only the patch embedding's convolution is computed as the equal matrix
    product.

    Args:
        model_type: `t2v` or `wan2.2-t2v`, which mean the same network.
        patch_size: latent frames, rows and columns of one token.
        text_len: prompt length that the model sees; shorter prompts are padded with zeros, longer ones
            refused.
        in_dim, out_dim: latent channels.
        hidden_size, num_heads: width, and heads of `hidden_size / num_heads` channels each.
        ffn_dim, freq_dim, text_dim, num_layers, cross_attn_norm, eps: as upstream's.
        qk_norm, qk_norm_type: must be True and `rmsnorm`; upstream always builds these norms.
        max_seq_len: length of the rotary table, the most tokens along one axis.
        attention_async_offload, recompute_granularity, recompute_method, recompute_num_layers, pipeline_num_layers:
            without effect on the module; how it is sharded follows from the section.

    Raises:
        UserError: a model type or norm that this class does not compute.
    """

    def __init__(
        self,
        *,
        model_type: str = "t2v",
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        hidden_size: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        qk_norm: bool = True,
        qk_norm_type: str = "rmsnorm",
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        max_seq_len: int = 1024,
        attention_async_offload: bool = False,
        recompute_granularity: str | None = None,
        recompute_method: str | None = None,
        recompute_num_layers: int | None = None,
        pipeline_num_layers: list[int] | list[list[int]] | None = None,
    ) -> None:
        if model_type not in MODEL_TYPES:
            raise UserError(
                f"wandit: model_type {model_type!r} is not offered here; it is one of "
                f"{', '.join(MODEL_TYPES)}"
            )
        if not qk_norm or qk_norm_type != "rmsnorm":
            raise UserError(
                "wandit: only qk_norm true with qk_norm_type 'rmsnorm' exists; the model always "
                "normalises queries and keys"
            )
        if hidden_size % num_heads:
            raise UserError(f"wandit: hidden_size {hidden_size} is not divisible by num_heads {num_heads}")
        patch_size = (patch_size[0], patch_size[1], patch_size[2])
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_heads,
            attention_head_dim=hidden_size // num_heads,
            in_channels=in_dim,
            out_channels=out_dim,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm="rms_norm_across_heads",
            eps=eps,
            image_dim=None,
            added_kv_proj_dim=None,
            rope_max_seq_len=max_seq_len,
        )
        self.patch_embedding = LinearPatchEmbedding(in_dim, hidden_size, patch_size)
        self.text_len = text_len

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt: torch.Tensor | list[torch.Tensor],
        prompt_mask: torch.Tensor | list[torch.Tensor] | None = None,
        *,
        stage: StageCall | None = None,
        **conditions: Any,
    ) -> torch.Tensor | Travelling:
        """Predict the velocity (noise - video) of noised latents.

        Args:
            latents: `[B, C, T, H, W]`, T, H and W divisible by the patch.
            timestep: `[B]`, or `[B, S]` for one a token; values in `[0, 1000]`.
            prompt: text embeddings `[B, L, D]`, L at most `text_len`; a list is one per text encoder, and
                Wan has one.
            prompt_mask: `[B, L]`, 1 for tokens of the prompt; embeddings elsewhere are replaced by zeros.
                None keeps all.
            stage: which pipeline stage to run, with what the one before returned; all of them by default.

        Returns:
            `[B, C, T, H, W]` in the parameters' dtype; of a stage that is not the last, what `stage_boundary` says.

        Raises:
            UserError: sizes that the patch does not divide, longer than the rotary table, or a prompt longer
                than `text_len`.
            TypeError: a condition that text to video does not have.
        """
        if conditions:
            raise TypeError(f"wandit (text to video) takes no condition {', '.join(sorted(conditions))}")
        self._check_sizes(latents)
        text = self._prepare_text(_single(prompt), None if prompt_mask is None else _single(prompt_mask))
        if stage is None or stage.first:
            weight = self.condition_embedder.text_embedder.linear_1.weight
            # A DTensor is a unit that FSDP has yet to gather, perhaps in another dtype.
            text = text if isinstance(weight, DTensor) else text.to(weight.dtype)
        if stage is not None:
            return run_stage(self, stage, latents, timestep, text)
        output: torch.Tensor = super().forward(latents, timestep, text, return_dict=False)[0]
        return output

    def stage_boundary(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        *_: Any,
        dtype: torch.dtype,
        share: Callable[[int], int] = int,
        **__: Any,
    ) -> Travelling:
        """What a pipeline stage hands to the next, given the arguments of `forward`: see `mm_plugin_wan22.stage`.

        Args:
            dtype: that the model computes in.
            share: how many of so many tokens this rank has.
        """
        return boundary(self.config, latents, timestep, self.text_len, dtype, share)

    def _check_sizes(self, latents: torch.Tensor) -> None:
        if latents.shape[1] != self.config.in_channels:
            raise UserError(
                f"wandit: the latents have {latents.shape[1]} channels, but in_dim is "
                f"{self.config.in_channels}; "
                "it must be the number of the autoencoder"
            )
        for axis, size, patch in zip("THW", latents.shape[2:], self.config.patch_size, strict=True):
            if size % patch:
                raise UserError(
                    f"wandit: latent size {axis}={size} is not divisible by the patch's {patch}; "
                    "choose a video size that the autoencoder's factor times patch_size divides"
                )
            if size // patch > self.rope.max_seq_len:
                raise UserError(
                    f"wandit: {size // patch} tokens along {axis} exceed max_seq_len "
                    f"{self.rope.max_seq_len}, the rotary table's length"
                )

    def _prepare_text(self, prompt: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Zero the embeddings beyond the mask and pad with zeros to `[B, text_len, D]`; Wan attends to
        the zeros too.
        """
        length = prompt.shape[1]
        if length > self.text_len:
            raise UserError(
                f"wandit: a prompt of {length} tokens is longer than text_len {self.text_len}; "
                "lower the tokenizer's model_max_length or raise text_len"
            )
        if mask is not None:
            # where, not a product: 0 * nan is nan
            prompt = torch.where(mask.unsqueeze(-1) > 0, prompt, torch.zeros_like(prompt))
        return F.pad(prompt, (0, 0, 0, self.text_len - length))

    def check_pretrained_config(self, config: Mapping[str, Any]) -> list[str]:
        """What a diffusers config.json says otherwise than this network, in our names and theirs; the length
        of the rotary table may differ, since it is computed.
        """
        return config_differences(self.config, config)

    def init_module(self, module: nn.Module) -> bool:
        """Draw upstream's initial values of a module that has no `reset_parameters`; False if it has none
        of its own.
        """
        if module is not self and not isinstance(module, WanTransformerBlock):
            return False
        table = module.scale_shift_table  # [1, 2 or 6, D]
        if table is None:  # another pipeline stage has it
            return True
        nn.init.normal_(table, std=table.shape[-1] ** -0.5)
        return True

    def reset_buffers(self, device: torch.device | str) -> None:
        """Compute the rotary tables anew; after a build on the meta device they hold nothing."""
        with torch.device("cpu"):  # float64 inside, which not every accelerator has
            rope = WanRotaryPosEmbed(
                self.config.attention_head_dim, self.config.patch_size, self.config.rope_max_seq_len
            )
        for name, table in rope.named_buffers():
            setattr(self.rope, name, table.to(device))


def _single(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if len(value) != 1:
        raise UserError(f"wandit: Wan reads one text encoder, but the model has {len(value)}")
    return value[0]
