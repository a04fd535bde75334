"""Wan's diffusion transformer under MindSpeed-MM's field names, computed by diffusers'
WanTransformer3DModel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import (
    WanImageEmbedding,
    WanRotaryPosEmbed,
    WanTransformerBlock,
)
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.sharding.pipeline import StageCall
from mm_plugin_wan22.conditioning import TokenTimesteps, check_conditions, for_upstream, image_tokens
from mm_plugin_wan22.patch_embedding import LinearPatchEmbedding
from mm_plugin_wan22.stage import Travelling, boundary, run_stage
from mm_plugin_wan22.variants import CLIP_TOKENS, IMAGE_EMBEDDED, MODEL_TYPES, TEXT_TOKENS_BESIDE_IMAGE
from mm_plugin_wan22.weights import config_differences
from mm_registry.errors import UserError


class WanDiT(WanTransformer3DModel):
    """The transformer of Wan2.1 and Wan2.2 (Wan et al., "Wan: Open and Advanced Large-Scale Video Generative
    Models", 2025).

    State-dict keys, shapes, initial distributions and mathematics are those of
    `diffusers.WanTransformer3DModel`; only the patch embedding's convolution is computed as the equal matrix
    product.

    Args:
        model_type: what the network is given beside the noised latents and the text, see `forward`. `t2v` and
            `wan2.2-t2v`: nothing. `wan2.2-i2v`: given frames on the input's channels. `i2v`, `flf2v` (Wan2.1): these and
            CLIP's features of one image or of two. `ti2v`: a first frame, if there is one.
        patch_size: latent frames, rows and columns of one token.
        text_len: prompt length that the model sees; shorter prompts are padded with zeros, longer ones
            refused.
        in_dim, out_dim: channels of the input, and of the latents.
        img_dim, clip_token_len: width of CLIP's features, for `i2v` and `flf2v`, and tokens of one image, for `flf2v`.
        seperated_timestep: without effect; a given first frame has timestep 0, and all else its sample's.
        hidden_size, num_heads: width, and heads of `hidden_size / num_heads` channels each.
        ffn_dim, freq_dim, text_dim, num_layers, cross_attn_norm, eps: as upstream's.
        qk_norm, qk_norm_type: must be True and `rmsnorm`; upstream always builds these norms.
        max_seq_len: length of the rotary table, the most tokens along one axis.
        attention_async_offload, recompute_granularity, recompute_method, recompute_num_layers, pipeline_num_layers,
            attention_backend: without effect on the module; how it is sharded and computed follows from the section.

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
        img_dim: int = 1280,
        clip_token_len: int = CLIP_TOKENS,
        seperated_timestep: bool | None = None,
        attention_async_offload: bool = False,
        recompute_granularity: str | None = None,
        recompute_method: str | None = None,
        recompute_num_layers: int | None = None,
        pipeline_num_layers: list[int] | list[list[int]] | None = None,
        attention_backend: str | None = None,
    ) -> None:
        if model_type not in MODEL_TYPES:
            raise UserError(
                f"wandit: model_type {model_type!r} is not offered here; it is one of "
                f"{', '.join(MODEL_TYPES)}"
            )
        with_image = model_type in IMAGE_EMBEDDED
        if with_image and text_len != TEXT_TOKENS_BESIDE_IMAGE:
            raise UserError(
                f"wandit: text_len {text_len} does not fit model_type {model_type}, whose text always has "
                f"{TEXT_TOKENS_BESIDE_IMAGE} tokens beside the image"
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
            image_dim=img_dim if with_image else None,
            added_kv_proj_dim=hidden_size if with_image else None,
            rope_max_seq_len=max_seq_len,
            pos_embed_seq_len=2 * clip_token_len if model_type == "flf2v" else None,
        )
        self.patch_embedding = LinearPatchEmbedding(in_dim, hidden_size, patch_size)
        self.token_timesteps = TokenTimesteps()
        self.model_type = model_type
        self.text_len = text_len

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt: torch.Tensor | list[torch.Tensor],
        prompt_mask: torch.Tensor | list[torch.Tensor] | None = None,
        *,
        i2v_vae_feature: torch.Tensor | None = None,
        first_frame_latents: torch.Tensor | None = None,
        clip_feature: torch.Tensor | None = None,
        stage: StageCall | None = None,
    ) -> torch.Tensor | Travelling:
        """Predict the velocity (noise - video) of noised latents.

        Args:
            latents: `[B, C, T, H, W]`, T, H and W divisible by the patch.
            timestep: `[B]`, or `[B, S]` for one a token; values in `[0, 1000]`.
            prompt: text embeddings `[B, L, D]`, L at most `text_len`; a list is one per text encoder, and
                Wan has one.
            prompt_mask: `[B, L]`, 1 for tokens of the prompt; embeddings elsewhere are replaced by zeros.
                None keeps all.
            i2v_vae_feature: `[B, in_dim - out_dim, T, H, W]`: mask and latents of the given frames, joined to the latents
                on their channels.
            first_frame_latents: `[B, C, 1, H, W]`; if given, the tokens of the first frame have timestep 0. The latents
                themselves hold that frame already.
            clip_feature: `[B, N, D]`: CLIP's features of the image, or of first and last one.
            stage: which pipeline stage to run, with what the one before returned; all of them by default.

        Returns:
            `[B, C, T, H, W]` in the parameters' dtype; of a stage that is not the last, what `stage_boundary` says.

        Raises:
            UserError: sizes that the patch does not divide, longer than the rotary table, a prompt longer
                than `text_len`, or conditions that are not those of the model's type.
        """
        given = {
            "i2v_vae_feature": i2v_vae_feature,
            "first_frame_latents": first_frame_latents,
            "clip_feature": clip_feature,
        }
        beside = self.config.in_channels - self.config.out_channels
        check_conditions(self.model_type, given, latents, beside, self.config.pos_embed_seq_len)
        tokens = self._token_grid(latents)
        text = self._prepare_text(_single(prompt), None if prompt_mask is None else _single(prompt_mask))
        if stage is None or stage.first:
            weight = self.condition_embedder.text_embedder.linear_1.weight
            if not isinstance(weight, DTensor):
                # A DTensor is a unit that FSDP has yet to gather, perhaps in another dtype.
                text = text.to(weight.dtype)
                clip_feature = None if clip_feature is None else clip_feature.to(weight.dtype)
            timestep = self.token_timesteps(timestep, tokens, first_frame_latents is not None)
            if clip_feature is not None:
                clip_feature = for_upstream(clip_feature, self.config.pos_embed_seq_len is not None)
            if i2v_vae_feature is not None:
                latents = torch.cat([latents, i2v_vae_feature.to(latents)], dim=1)
        if stage is not None:
            return run_stage(self, stage, latents, timestep, text, clip_feature)
        output: torch.Tensor = super().forward(latents, timestep, text, clip_feature, return_dict=False)[0]
        return output

    def stage_boundary(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        *_: Any,
        dtype: torch.dtype,
        share: Callable[[int], int] = int,
        first_frame_latents: torch.Tensor | None = None,
        clip_feature: torch.Tensor | None = None,
        **__: Any,
    ) -> Travelling:
        """What a pipeline stage hands to the next, given the arguments of `forward`: see `mm_plugin_wan22.stage`.

        Args:
            dtype: that the model computes in.
            share: how many of so many tokens this rank has.
        """
        each_token = timestep.ndim == 2 or first_frame_latents is not None
        context = self.text_len + image_tokens(clip_feature)
        return boundary(self.config, latents, each_token, context, dtype, share)

    def _token_grid(self, latents: torch.Tensor) -> tuple[int, int, int]:
        """How many tokens `[B, C, T, H, W]` have along T, H and W."""
        if latents.shape[1] != self.config.out_channels:
            raise UserError(
                f"wandit: the latents have {latents.shape[1]} channels, but out_dim is "
                f"{self.config.out_channels}; "
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
        frames, rows, columns = latents.shape[2:]
        patch = self.config.patch_size
        return frames // patch[0], rows // patch[1], columns // patch[2]

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
        if isinstance(module, WanImageEmbedding):
            if module.pos_embed is not None:
                nn.init.zeros_(module.pos_embed)
            return module.pos_embed is not None
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
