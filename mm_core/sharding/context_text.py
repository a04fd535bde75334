"""Ranks that share a sequence exchange in the attention of transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mm_core.sharding.plan import ShardingError

_NAME = "mmzoo_context_parallel"
_ATTRIBUTE = "_mm_attend"


def is_transformers(module: nn.Module) -> bool:
    """Whether a module looks its attention up in transformers' registry."""
    return hasattr(getattr(module, "config", None), "_attn_implementation")


def transformers_problem(module: nn.Module, name: str) -> str | None:
    """What an attention module of transformers does that ranks which share a sequence cannot: a part of a sentence; None
    if there is nothing, or the module is of another library.
    """
    if not is_transformers(module):
        return None
    if getattr(module, "sliding_window", None):
        return f"{name} has a sliding window of {module.sliding_window} tokens, which ranks cannot share"
    if getattr(module, "attention_dropout", 0):
        return f"{name} has an attention_dropout of {module.attention_dropout}, of which ranks would draw different parts"
    return None


def exchange_in_transformers(module: nn.Module, attend: Callable[..., torch.Tensor]) -> None:
    """Let an attention module of transformers exchange tokens, in place: its model then takes the implementation of that
    name, for which transformers makes no masks.

    Args:
        attend: `ContextParallel.attend`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    setattr(module, _ATTRIBUTE, attend)
    # The public setter is a method of whole models, which a part of one does not have.
    config: Any = module.config
    config._attn_implementation = _NAME


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        query: `[B, H, S_rank, D]`.
        key, value: `[B, G, S_rank, D]`.

    Returns:
        `[B, S_rank, H, D]`, and no weights.

    Raises:
        ShardingError: it is asked for what is not computed here.
    """
    attend: Callable[..., torch.Tensor] | None = getattr(module, _ATTRIBUTE, None)
    unsupported = {
        "a mask": attention_mask is not None,
        "dropout": bool(dropout),
        "a sliding window": bool(sliding_window),
        "keys of a cache": query.shape[2] != key.shape[2],
        "full attention in place of causal": is_causal is False,
        "attention sinks": kwargs.get("s_aux") is not None,
        "a cap of scores": kwargs.get("softcap") is not None,
    }
    what = next((name for name, given in unsupported.items() if given), None)
    if attend is None or what is not None:
        raise ShardingError(
            f"{type(module).__name__} attends "
            + (
                f"with {what}"
                if what
                else "but is not among the attention modules of its sharding policy (context)"
            )
            + ", which ranks that share a sequence do not support; set --context-parallel-size to 1."
        )
    return attend(query, key, value, scale=scaling).transpose(1, 2).contiguous(), None
