"""Attention of some queries to some keys, with what is needed to join it with that to other keys.

The softmax over several blocks of keys follows from each block's result and the logarithm of its sum of exponentials
(Milakov and Gimelshein, arXiv:1805.02867), and so do the gradients from the joined ones (FlashAttention,
arXiv:2205.14135). No public operation of torch gives and takes these, so this file, and no other, calls the operations
behind `scaled_dot_product_attention`; they have an eager twin of the same mathematics.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from mm_core.accelerator import has_flash_attention

Kernel: TypeAlias = Literal["fused", "eager"]

_SCORES = 2**24
"""The most scores that the eager form holds at once."""


def kernel_for(query: torch.Tensor, value: torch.Tensor) -> Kernel:
    """Which form computes blocks of these tensors, `[B, H, S, D]`: torch's fused operation, where the device and the dtype
    have one that gives the log-sum-exp.
    """
    if query.shape[-1] != value.shape[-1]:
        return "eager"
    if query.device.type == "cpu":
        return "fused" if query.is_floating_point() else "eager"
    width = query.shape[-1]
    # FlashAttention's own limits, which scaled_dot_product_attention would mend by padding.
    fits = query.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    return "fused" if fits and has_flash_attention(query.device) else "eager"


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results of blocks are added up: fp32, or fp64 for itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, scale: float, kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one block of keys.

    Args:
        query: `[B, H, Q, D]`.
        key, value: `[B, G, K, D]`, where G divides H; each is for `H / G` heads that follow each other.
        causal: query i sees keys 0 to i; there are as many keys as queries then.
        scale: of the scores.

    Returns:
        The result `[B, H, Q, D]`, and the log-sum-exp of the scores `[B, H, Q]` in `sum_dtype`.
    """
    heads = query.shape[1]
    key, value = _for_heads(key, heads), _for_heads(value, heads)
    if kernel == "eager":
        return _eager_forward(query, key, value, causal, scale)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
    return out, lse


def block_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    kernel: Kernel,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one block of keys adds to the gradients.

    Args:
        gradient: of the joined result, `[B, H, Q, D]`.
        query, key, value, causal, scale, kernel: as in the forward pass.
        out, lse: joined over all blocks.

    Returns:
        Of query, key and value, in the shapes of these.
    """
    heads, groups = query.shape[1], key.shape[1]
    wide_key, wide_value = _for_heads(key, heads), _for_heads(value, heads)
    if kernel == "eager":
        parts = _eager_backward(gradient, query, wide_key, wide_value, out, lse, causal, scale)
    elif query.device.type == "cpu":
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, wide_key, wide_value, out, lse, 0.0, causal, scale=scale
        )
    else:
        unused = torch.empty((), dtype=torch.int64, device=query.device)  # the dropout's seed and offset
        parts = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            gradient, query, wide_key, wide_value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2],
            0.0, causal, unused, unused, scale=scale,
        )  # fmt: skip
    of_query, of_key, of_value = parts
    return of_query, _of_groups(of_key, groups), _of_groups(of_value, groups)


def _for_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, G, S, D]` -> `[B, H, S, D]`."""
    repeats = heads // tensor.shape[1]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)


def _of_groups(gradient: torch.Tensor, groups: int) -> torch.Tensor:
    """`[B, H, S, D]` -> `[B, G, S, D]`, the sum over the heads of a group."""
    if gradient.shape[1] == groups:
        return gradient
    return gradient.unflatten(1, (groups, -1)).sum(2, dtype=sum_dtype(gradient.dtype))


def _eager_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = sum_dtype(query.dtype)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=dtype)
    key, value = key.to(dtype), value.to(dtype)
    for start, stop in _parts(query, key):
        scores = _scores(query[:, :, start:stop].to(dtype), key, causal, scale, start)
        lse[:, :, start:stop] = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse[:, :, start:stop, None])
        out[:, :, start:stop] = weights @ value
    return out, lse


def _eager_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = sum_dtype(query.dtype)
    key, value = key.to(dtype), value.to(dtype)
    of_query = torch.empty_like(query, dtype=dtype)
    of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
    for start, stop in _parts(query, key):
        part, of_out = query[:, :, start:stop].to(dtype), gradient[:, :, start:stop].to(dtype)
        weights = torch.exp(_scores(part, key, causal, scale, start) - lse[:, :, start:stop, None])
        of_value += weights.transpose(-1, -2) @ of_out
        shared = (of_out * out[:, :, start:stop]).sum(-1, keepdim=True)
        of_scores = weights * (of_out @ value.transpose(-1, -2) - shared) * scale
        of_query[:, :, start:stop] = of_scores @ key
        of_key += of_scores.transpose(-1, -2) @ part
    return of_query, of_key, of_value


def _scores(query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float, first: int) -> torch.Tensor:
    scores = (query @ key.transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(first + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _parts(query: torch.Tensor, key: torch.Tensor) -> list[tuple[int, int]]:
    """Queries that are computed together."""
    batch, heads, length, _ = query.shape
    step = max(1, _SCORES // max(1, batch * heads * key.shape[2]))
    return [(start, min(start + step, length)) for start in range(0, length, step)]
