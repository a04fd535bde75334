"""How the losses of tokens are weighted before they are added up, by sample or packed document."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

IGNORED = -100
"""Label of a token that is not learnt, as in transformers."""

LossType: TypeAlias = Literal["default", "per_sample_loss", "per_token_loss", "token_loss", "square_loss"]
"""MindSpeed-MM's names; all but `per_sample_loss` and `square_loss` give each learnt token the same weight."""
UNIFORM: tuple[LossType, ...] = ("default", "per_token_loss", "token_loss")


def next_tokens(labels: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
    """What each place of `labels` `[B, S]` is to predict: the next one's label; nothing at the end.

    Args:
        documents: which document of its row each place belongs to, `[B, S]`: the last place of one predicts nothing.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if documents is None:
        return targets
    ends = torch.nn.functional.pad(documents.diff(dim=1) != 0, (0, 1), value=True)
    return targets.masked_fill(ends, IGNORED)


def token_weights(
    targets: torch.Tensor, owners: torch.Tensor, count: int, loss_type: LossType
) -> torch.Tensor:
    """The weight of each token's loss, so that the loss is `sum of weighted losses / sum of weights` over the global batch.

    With n learnt tokens in a sample: 1 (every token counts the same), `1 / n` for `per_sample_loss` (every sample does),
    `1 / sqrt(n)` for `square_loss` (between the two).

    Args:
        targets: `[B, S]`, `IGNORED` where nothing is learnt.
        owners: of which sample, or packed document, each token is, `[B, S]`, from 0 to `count - 1`.

    Returns:
        `[B, S]` fp32, 0 where nothing is learnt.
    """
    learnt = targets != IGNORED
    if loss_type in UNIFORM:
        return learnt.float()
    number = torch.bincount(owners[learnt], minlength=count).double()
    each = number if loss_type == "per_sample_loss" else number.sqrt()
    return torch.where(learnt, (1 / each.clamp(min=1))[owners], 0).float()


def sums_of(values: torch.Tensor, owners: torch.Tensor | None, count: int) -> torch.Tensor:
    """Sums of `values` `[B, S]` over each sample, or packed document, `[count]`.

    Args:
        owners: see `token_weights`; None: each row is one.
    """
    if owners is None:
        return values.sum(1)
    return values.new_zeros(count).index_add(0, owners.flatten(), values.flatten())
