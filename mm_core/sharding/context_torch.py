"""Ranks that share a sequence exchange in modules that call torch's attention."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from mm_core.sharding.plan import ShardingError

if TYPE_CHECKING:
    from mm_core.sharding.context import ContextParallel


class _Attention(TorchFunctionMode):
    """Puts the exchange in place of each call of `scaled_dot_product_attention`."""

    def __init__(self, context: ContextParallel, name: str) -> None:
        super().__init__()
        self.context, self.name = context, name
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,  # seen by the numbers of heads
    ) -> torch.Tensor:
        if attn_mask is not None or dropout_p or is_causal != self.context.policy.causal:
            what = "a mask" if attn_mask is not None else "dropout" if dropout_p else f"is_causal={is_causal}"
            raise ShardingError(
                f"{self.name} calls attention with {what}, which ranks that share a sequence do not support; "
                "set --context-parallel-size to 1."
            )
        return self.context.attend(query, key, value, scale=scale)


def exchange_in_torch(module: nn.Module, name: str, context: ContextParallel) -> None:
    """Let a module whose forward calls torch's attention exchange tokens there, in place."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Attention(context, name) as attention:
            result = own(*args, **kwargs)
        if not attention.calls:
            raise ShardingError(
                f"{name} computed attention without torch's scaled_dot_product_attention (another attention backend was "
                "chosen), so its tokens cannot be exchanged; choose the native backend, or set --context-parallel-size to 1."
            )
        return result

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]  # what wrappers look at
    module.forward = forward
