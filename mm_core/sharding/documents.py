"""Documents that are packed into the rows of a batch."""

from __future__ import annotations

import torch

from mm_core.sharding.sequence import Documents
from mm_registry.errors import UserError


def documents_of(positions: torch.Tensor) -> Documents | None:
    """Where documents begin, by the positions of tokens: those of a document go up by one.

    Waits for the device once.

    Args:
        positions: `[B, S]`, or `[1, S]` for all rows; also `[4, B, S]`, whose first are those (transformers' form for
            positions in text, time, height and width). `[3, B, S]`, without those of text, says nothing.

    Returns:
        None: each row is one document.
    """
    if positions.ndim == 3:
        if positions.shape[0] != 4:
            return None
        positions = positions[0]
    begins = (positions.diff(dim=-1) != 1).nonzero().tolist()
    if not begins:
        return None
    rows, length = positions.shape
    bounds: list[list[int]] = [[0] for _ in range(rows)]
    for row, before in begins:
        bounds[row].append(before + 1)
    return tuple((*row, length) for row in bounds)


def refuse_padding(mask: torch.Tensor, argument: str, name: str) -> None:
    """Rows may be padded at their end only, where causal attention sees nothing of it. Waits for the device once.

    Args:
        mask: `[B, S]`, 0 where a row is padded.
        argument, name: of the mask and of the model, for the message.

    Raises:
        UserError: one is padded elsewhere, or this is another kind of mask.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        shown = (
            f"of shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        )
        raise UserError(
            f"{name}: {argument} is {shown}, but ranks that share a sequence take a mask [B, S] of its padding only; "
            "set --context-parallel-size to 1."
        )
    if bool((mask.long().diff(dim=-1) > 0).any()):
        raise UserError(
            f"{name}: {argument} has a row whose padding is not at its end, which ranks that share a sequence would attend "
            'to; pad on the right (padding_side "right"), or set --context-parallel-size to 1.'
        )
