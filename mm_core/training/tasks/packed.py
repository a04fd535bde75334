"""Batches whose rows hold several documents: positions that begin anew with each, and their labels and owners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mm_core.models.packed_attention import pieces

_GRIDS = ("image_grid_thw", "video_grid_thw")
_KINDS = "mm_token_type_ids"


def owners_of(ends: tuple[tuple[int, ...], ...], length: int) -> torch.Tensor:
    """To which document of the batch, counted over all rows, each token belongs, int64 `[B, S]`; padding has any."""
    owners = torch.zeros(len(ends), length, dtype=torch.int64)
    for number, (row, start, end) in enumerate(pieces(ends)):
        owners[row, start:end] = number
    return owners


def packed_positions(
    network: Any, batch: Mapping[str, Any], ends: tuple[tuple[int, ...], ...]
) -> torch.Tensor:
    """The positions of tokens, which begin anew with each document.

    Args:
        network: of transformers. One with positions in time, height and width has a `get_rope_index`, which is asked about
            each document by itself.
        batch: on the CPU: `input_ids` `[B, S]`, and for images and videos `mm_token_type_ids` and their grids.
        ends: see `mm_core.models.packed_attention.ends_of`.

    Returns:
        int64 `[B, S]`, or `[4, B, S]`: in the text, in time, in height, in width.
    """
    ids = batch["input_ids"]
    rows, length = ids.shape
    text = torch.arange(length).repeat(rows, 1)
    found = pieces(ends)
    for row, start, end in found:
        text[row, start:end] = torch.arange(end - start)
        text[row, end:] = torch.arange(length - end)  # of the padding, if it is that
    index = getattr(network, "get_rope_index", None) or getattr(
        getattr(network, "base_model", None), "get_rope_index", None
    )
    if index is None:
        return text
    grids = {name: batch[name] for name in _GRIDS if batch.get(name) is not None}
    whole = text.expand(4, rows, length).clone()
    if not grids:
        return whole
    longest = max(end - start for _, start, end in found)
    own = {name: ids.new_zeros(len(found), longest) for name in ("input_ids", "attention_mask", _KINDS)}
    for number, (row, start, end) in enumerate(found):
        own["input_ids"][number, : end - start] = ids[row, start:end]
        own["attention_mask"][number, : end - start] = 1
        own[_KINDS][number, : end - start] = batch[_KINDS][row, start:end]
    positions, _ = index(**own, **grids)  # [3, documents, longest]
    for number, (row, start, end) in enumerate(found):
        whole[1:, row, start:end] = positions[:, number, : end - start]
    return whole
