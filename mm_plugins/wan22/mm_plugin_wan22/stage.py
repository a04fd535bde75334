"""One pipeline stage of Wan's transformer: upstream's modules, called from the beginning, in the middle or to the end.

Between stages travel the tokens, the embedded prompt and two forms of the embedded timestep; with context parallelism a
rank's own tokens, and the timesteps of these. All of them have
gradients: those of the conditions add up over the stages and end in `condition_embedder`, which the first one has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from mm_core.sharding.pipeline import StageCall

Travelling = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def boundary(
    config: Any,
    latents: torch.Tensor,
    each_token: bool,
    context: int,
    dtype: torch.dtype,
    share: Callable[[int], int],
) -> Travelling:
    """What one stage hands to the next, on the meta device.

    Args:
        config: of the transformer.
        latents: `[B, C, T, H, W]`.
        each_token: whether each token has a timestep, rather than each sample.
        context: tokens of the prompt, and of images.
        share: how many of so many tokens this rank has.

    Returns:
        Tokens `[B, S, D]`, context `[B, context, D]`, modulation `[B, 6, D]` and timestep `[B, D]`; the last two are
        `[B, S, 6, D]` and `[B, S, D]` where each token has a timestep.
    """
    batch, _, *sizes = latents.shape
    tokens = share(math.prod(size // patch for size, patch in zip(sizes, config.patch_size, strict=True)))
    width = config.num_attention_heads * config.attention_head_dim
    each = (batch, tokens) if each_token else (batch,)
    shapes = ((batch, tokens, width), (batch, context, width), (*each, 6, width), (*each, width))
    hidden, attended, modulation, embedded = (torch.empty(s, dtype=dtype, device="meta") for s in shapes)
    return hidden, attended, modulation, embedded


def run_stage(
    model: Any,
    stage: StageCall,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    prompt: torch.Tensor,
    clip_feature: torch.Tensor | None = None,
) -> torch.Tensor | Travelling:
    """What `WanTransformer3DModel.forward` computes, of one stage of it.

    Args:
        model: the transformer, with the modules that the stage needs.
        latents: `[B, C, T, H, W]`, with the channels of given frames; stages but the first need their sizes alone.
        timestep: `[B]` or `[B, S]`.
        prompt: `[B, text_len, text_dim]`.
        clip_feature: of images, as upstream's embedding takes them.

    Returns:
        What travels on (see `boundary`); of the last stage the prediction `[B, C, T, H, W]`.
    """
    rotary = model.rope(latents)
    if stage.first:
        hidden, prompt, modulation, embedded = _embed(model, latents, timestep, prompt, clip_feature)
    else:
        hidden, prompt, modulation, embedded = stage.received
    for name in stage.blocks:
        hidden = model.blocks.get_submodule(name)(hidden, prompt, modulation, rotary)
    if not stage.last:
        return hidden, prompt, modulation, embedded
    return _predict(model, hidden, embedded, latents.shape[2:])


def _embed(
    model: Any,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    prompt: torch.Tensor,
    clip_feature: torch.Tensor | None,
) -> Travelling:
    hidden = model.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
    tokens = timestep.shape[1] if timestep.ndim == 2 else None
    embedded, modulation, prompt, images = model.condition_embedder(
        timestep.flatten(), prompt, clip_feature, timestep_seq_len=tokens
    )
    if images is not None:
        prompt = torch.cat([images, prompt], dim=1)
    return hidden, prompt, modulation.unflatten(-1, (6, -1)), embedded


def _predict(model: Any, hidden: torch.Tensor, embedded: torch.Tensor, sizes: torch.Size) -> torch.Tensor:
    # [B, 2, D], or [B, S, 2, D] where each token has a timestep
    shift, scale = (model.scale_shift_table + embedded.unsqueeze(-2)).chunk(2, dim=-2)
    if embedded.ndim == 3:
        shift, scale = shift.squeeze(-2), scale.squeeze(-2)
    hidden = (model.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    patch = model.config.patch_size
    counts = [size // step for size, step in zip(sizes, patch, strict=True)]
    pixels = model.proj_out(hidden).unflatten(1, counts).unflatten(-1, (*patch, -1))
    # [B, T', H', W', pt, ph, pw, C] -> [B, C, T', pt, H', ph, W', pw]
    return pixels.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(hidden), -1, *sizes)
