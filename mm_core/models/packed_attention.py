"""Attention in rows that hold several documents one after another, each of which sees itself alone.

The implementation is registered with transformers by a name, as its documentation asks for other kernels, and takes the
documents from a keyword that transformers' models hand down to their attention. No mask is made: neither memory nor time
grows with the square of a row.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from mm_core.accelerator import has_flash_attention
from mm_registry.errors import UserError

log = logging.getLogger(__name__)

KEYWORD = "mmzoo_documents"
"""The argument of a network's forward that holds a `PackedDocuments`."""
_NAME = "mmzoo_packed"
_SDPA = "sdpa"
# These make a mask of documents by themselves, from positions that begin anew.
_MASKED = ("eager", "flex_attention")


@dataclass
class PackedDocuments:
    """Where the documents of a batch's rows lie.

    Args:
        ends: of each row, where its documents end; what follows the last one is padding.
        length: of a row, S.
        device: of the network's inputs.

    Attributes:
        offsets: where the documents begin in the flattened batch, and where the last one ends, int32 `[N + 1]`; padding at
            the end of a row counts as one. What kernels for sequences of different lengths take.
        longest: tokens of the longest.
        used: how many attention layers have read this.
    """

    ends: tuple[tuple[int, ...], ...]
    length: int
    device: torch.device
    offsets: torch.Tensor = field(init=False)
    longest: int = field(init=False)
    used: int = 0

    def __post_init__(self) -> None:
        starts = [0]
        for row, ends in enumerate(self.ends):
            starts += [row * self.length + end for end in (*ends, self.length)]
        starts = list(dict.fromkeys(starts))
        self.offsets = torch.tensor(starts, dtype=torch.int32).to(self.device, non_blocking=True)
        self.longest = max((b - a for a, b in pairwise(starts)), default=0)


def keeps_documents_apart(network: Any) -> bool:
    """Let the text part of a network attend within documents; logs how. Call it before each packed batch.

    Args:
        network: of transformers, sharded or not.

    Returns:
        Whether its forward is to be given `KEYWORD`. Else positions that begin anew are enough.

    Raises:
        UserError: its attention cannot.
    """
    config = network.config.get_text_config()
    name = config._attn_implementation
    if name == _NAME:
        return True
    shares = name.startswith("mmzoo_")  # ranks that share sequences, which look at positions
    if shares or name in _MASKED:
        return False
    # A package of FlashAttention finds documents in a single row only, and waits for the device in each layer.
    if name != _SDPA and not name.startswith("flash_attention"):
        raise UserError(
            f"rows are packed, but the attention {name} of {type(network).__name__} is not known to keep documents apart; "
            "write attn_implementation: sdpa, or take neat_packing out of the data file"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UserError(
            f"rows are packed, but {type(network).__name__} attends in a sliding window of {config.sliding_window} tokens, "
            "which packed rows do not support yet; take neat_packing out of the data file"
        )
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    # The public setter would make each part take it, which is for the text alone.
    config._attn_implementation = _NAME
    how = "torch's attention" if name == _SDPA else f"torch's attention in place of {name}"
    log.info("packed rows: text attends within each document, by %s", how)
    return True


def refuse_padding_before(mask: torch.Tensor, network: Any) -> None:
    """Rows that are not packed may be padded at their end only, once `keeps_documents_apart` has chosen: no mask is made.

    Args:
        mask: `[B, S]` on the CPU, 0 where a row is padded.

    Raises:
        UserError: one is padded elsewhere.
    """
    own = network.config.get_text_config()._attn_implementation == _NAME
    if own and bool((mask.long().diff(dim=-1) > 0).any()):
        raise UserError(
            "attention_mask has a row whose padding is not at its end, which cannot be mixed with packed rows; pad on the "
            'right (padding_side "right")'
        )


def check_used(documents: PackedDocuments, network: Any) -> None:
    """Raise UserError if no attention layer was given the documents."""
    if not documents.used:
        raise UserError(
            f"rows are packed, but {type(network).__name__} does not hand its keywords to its attention, so documents would see "
            "each other; take neat_packing out of the data file"
        )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, G, S, D]`.

    Returns:
        `[B, S, H, D]`, zeros where a row is padded, and no weights.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    documents: PackedDocuments | None = kwargs.pop(KEYWORD, None)
    function, options = ALL_ATTENTION_FUNCTIONS[_SDPA], {"dropout": dropout, "scaling": scaling}
    if documents is None:
        # A row is one document, padded at its end if at all.
        return function(module, query, key, value, attention_mask, **options, **kwargs)
    kwargs.pop("position_ids", None)
    by_block = functools.partial(function, module, attention_mask=None, **options, **kwargs)
    return _within_documents(query, key, value, documents, by_block, scaling, bool(dropout)), None


# A compiled block calls it as it is: compiled anew for the documents of each batch, it would gain nothing.
@torch.compiler.disable
def _within_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: PackedDocuments,
    by_block: Callable[..., tuple[torch.Tensor, Any]],
    scaling: float | None,
    dropout: bool,
) -> torch.Tensor:
    """`[B, S, H, D]`.

    Args:
        by_block: attention of one document.
        scaling: of the scores, for a kernel; None: by the width of a head.
        dropout: whether attention has some, which the kernel has not.
    """
    documents.used += 1
    if not dropout and _has_kernel(query, value):
        return _by_kernel(query, key, value, documents, scaling)
    rows = []
    for row, ends in enumerate(documents.ends):
        parts = []
        for start, end in pairwise((0, *ends)):
            own = [t[row : row + 1, :, start:end] for t in (query, key, value)]
            parts.append(by_block(*own)[0])
        rest = documents.length - sum(part.shape[1] for part in parts)
        if rest or not parts:
            parts.append(query.new_zeros(1, rest, query.shape[1], value.shape[-1]))
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def _has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's attention of sequences of different lengths serves; it has kernels of FlashAttention only."""
    if query.dtype not in (torch.float16, torch.bfloat16) or not has_flash_attention(query.device):
        return False
    width = query.shape[-1]
    return width == value.shape[-1] and width % 8 == 0 and width <= 256 and _varlen() is not None


def _varlen() -> Any:
    """torch's `varlen_attn`, in the form that it has from 2.13 on; None where it is another or missing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: PackedDocuments,
    scaling: float | None,
) -> torch.Tensor:
    """`[B, S, H, D]`; all rows in one call."""
    flat = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # [B * S, heads, D]
    offsets, longest = documents.offsets, documents.longest
    out: torch.Tensor = _varlen()(
        *flat,
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # itself and all before
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def ends_of(document_ids: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Of each row, where its documents end.

    Args:
        document_ids: int64 `[B, S]` on the CPU: 0 for the first document of a row, then 1 and so on, -1 where the row is
            padded at its end.

    Raises:
        ValueError: they are something else.
    """
    found = []
    for row, ids in enumerate(document_ids.tolist()):
        ends: list[int] = []
        before = -1  # the value of the place before
        for place, one in enumerate(ids):
            if one == before and place:
                continue
            if not (one == before + 1 and (place == 0 or before >= 0)) and one != -1:
                raise ValueError(
                    f"document_ids: row {row} has {one} at place {place}; documents count up from 0, one after another, and "
                    "-1 is at the end of a row only"
                )
            if place and before >= 0:
                ends.append(place)
            before = one
        if before >= 0:
            ends.append(len(ids))
        found.append(tuple(ends))
    return tuple(found)


def pieces(ends: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Row, start and end of each document, in order."""
    return [(row, start, end) for row, own in enumerate(ends) for start, end in pairwise((0, *own))]
