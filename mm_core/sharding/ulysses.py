"""Ulysses: for attention, ranks that share a sequence exchange their tokens for heads.

After Jacobs et al., "DeepSpeed Ulysses" (arXiv:2309.14509). Each rank then has the whole sequence of some heads, so
attention is the ordinary one; lengths may differ from rank to rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_to_all_single_autograd

from mm_core.sharding.sequence import Documents, SequenceLayout


def ulysses_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SequenceLayout,
    group: dist.ProcessGroup,
    *,
    causal: bool = False,
    scale: float | None = None,
    documents: Documents | None = None,
) -> torch.Tensor:
    """`softmax(query key^T · scale) value` over a sequence that the ranks of a group share.

    Every rank of the group calls this. The group's size divides H; where it does not divide G, keys and values are
    repeated until it does.

    Args:
        query: of this rank's tokens, `[B, H, S_rank, D]`.
        key, value: `[B, G, S_rank, D]`, where G divides H.
        layout: which tokens each rank of the group holds, a span each.
        causal: tokens see themselves and those before them only.
        scale: of the scores; `1 / sqrt(D)` by default.
        documents: packed ones, which do not see each other.

    Returns:
        `[B, H, S_rank, D]` in the dtype of `query`.
    """
    ranks = dist.get_world_size(group)
    assert layout.in_order
    assert query.shape[1] % ranks == 0
    repeats = ranks // math.gcd(ranks, key.shape[1])
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    whole = exchange_for_heads([query, key, value], layout, group)
    return exchange_for_tokens(
        dense_attention(*whole, causal=causal, scale=scale, documents=documents), layout, group
    )


def exchange_for_heads(
    tensors: Sequence[torch.Tensor], layout: SequenceLayout, group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """All heads of this rank's tokens -> this rank's heads of all tokens, in one collective.

    Args:
        tensors: `[B, H, S_rank, D]`; H and D may differ, the group's size divides H.

    Returns:
        `[B, H / ranks, S, D]`.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    batch = tensors[0].shape[0]
    shapes = [(t.shape[1] // ranks, t.shape[3]) for t in tensors]
    # [B, ranks, h, S, D] -> [ranks, S, B, h * D]: whom it goes to comes first, so that what arrives is in order.
    parts = [t.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4).flatten(3) for t in tensors]
    own = layout.sizes[rank]
    rows = torch.cat(parts, -1).flatten(0, 1)  # [ranks * S_rank, B, …]
    received = all_to_all_single_autograd(rows, list(layout.sizes), [own] * ranks, group)  # [S, B, …]
    split = received.view(layout.length, batch, -1).split([heads * width for heads, width in shapes], -1)
    return [part.unflatten(-1, shape).permute(1, 2, 0, 3) for part, shape in zip(split, shapes, strict=True)]


def exchange_for_tokens(
    tensor: torch.Tensor, layout: SequenceLayout, group: dist.ProcessGroup
) -> torch.Tensor:
    """This rank's heads of all tokens `[B, H / ranks, S, D]` -> all heads of its tokens `[B, H, S_rank, D]`."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, heads, _, width = tensor.shape
    rows = tensor.permute(2, 0, 1, 3).contiguous()  # [S, B, h, D]
    own = layout.sizes[rank]
    received = all_to_all_single_autograd(rows, [own] * ranks, list(layout.sizes), group)
    received = received.view(ranks, own, batch, heads, width)
    return received.permute(2, 0, 3, 1, 4).flatten(1, 2)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    documents: Documents | None = None,
) -> torch.Tensor:
    """Attention of whole sequences, document by document.

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, G, S, D]`, where G divides H.
        documents: as for `ulysses_attention`.
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, **grouped)

    def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
        if len(bounds) == 2:
            return attend(q, k, v)
        # One call a document: a mask over all pairs would grow with the square of the length.
        parts = [attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise(bounds) if a < b]
        return torch.cat(parts, 2)

    if documents is None:
        return attend(query, key, value)
    if len(set(documents)) == 1:
        return attend_rows(query, key, value, documents[0])
    rows = [
        attend_rows(query[i : i + 1], key[i : i + 1], value[i : i + 1], bounds)
        for i, bounds in enumerate(documents)
    ]
    return torch.cat(rows)
