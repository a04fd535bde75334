"""Memory of activations: what is recomputed in the backward pass, and what waits for it in host memory."""

from __future__ import annotations

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from mm_core.sharding.plan import ShardingPlan


def wrap_activations(modules: dict[str, nn.Module], plan: ShardingPlan) -> None:
    """Wrap the modules that a plan recomputes, in place; `modules` then holds the wrappers.

    Args:
        modules: of the root, by their bare paths.
    """
    for path in plan.recompute:
        impl = CheckpointImpl.REENTRANT if plan.use_reentrant else CheckpointImpl.NO_REENTRANT
        modules[path] = _replace(modules, path, checkpoint_wrapper(modules[path], checkpoint_impl=impl))


def _replace(modules: dict[str, nn.Module], path: str, wrapped: nn.Module) -> nn.Module:
    parent, _, name = path.rpartition(".")
    # ModuleList and ModuleDict keep their members under such names too.
    setattr(modules[parent], name, wrapped)
    return wrapped
