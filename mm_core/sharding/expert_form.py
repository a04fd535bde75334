"""Which modules of experts can exchange tokens between ranks. Known before a rank starts."""

from __future__ import annotations

import inspect

from torch import nn

from mm_core.sharding.plan import ShardingError, bare_name

_HOW = (
    "distributed are modules whose forward is (hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> "
    "[T, H], with parameters [experts, …] of their own, or which define ep_forward(ep_group, …)"
)


def exchanges_itself(module: nn.Module) -> bool:
    """Whether a module brings its own exchange of tokens, as MindSpeed-MM's do."""
    return callable(getattr(module, "ep_forward", None))


def check_form(module: nn.Module, shown: str) -> None:
    """Check that the experts of a module can be dealt out.

    Args:
        shown: the module's path, for messages.

    Raises:
        ShardingError: they cannot.
    """
    nested = next((bare_name(name) for name, _ in module.named_parameters() if "." in bare_name(name)), None)
    if nested is not None:
        raise ShardingError(f'moe_modules: "{shown}" keeps {nested} in a module of its own; {_HOW}.')
    if not exchanges_itself(module):
        argument_order(module, shown)


def argument_order(module: nn.Module, shown: str) -> tuple[int, int]:
    """Where a forward takes the experts of each token, and their weights; the tokens come first.

    Raises:
        ShardingError: it takes something else.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    index = [i for i, name in enumerate(needed) if "ind" in name or "selected" in name]
    weights = [i for i, name in enumerate(needed) if "weight" in name or "score" in name]
    if (
        len(needed) != 3
        or len(index) != 1
        or len(weights) != 1
        or index == weights
        or 0 in (index[0], weights[0])
    ):
        raise ShardingError(
            f'moe_modules: "{shown}" is called with ({", ".join(needed)}), so its tokens cannot be exchanged; {_HOW}.'
        )
    return index[0], weights[0]
