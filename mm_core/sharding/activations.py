"""Memory of activations: what is recomputed in the backward pass, and what waits for it in host memory."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, CheckpointWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mm_core.accelerator import Accelerator
from mm_core.sharding.offload import Offloader, OffloadWrapper
from mm_core.sharding.plan import ShardingError, ShardingPlan, is_inside

log = logging.getLogger(__name__)

_KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::linear",
        "aten::_scaled_mm",
        "aten::_grouped_mm",
        "aten::_scaled_grouped_mm",
        "aten::convolution",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "torch_attn::_varlen_attn",
        "npu::npu_fusion_attention",
        "npu::npu_grouped_matmul",
        "flex_attention",
    }
)
_KEPT_BEGINNINGS = ("aten::_scaled_dot_product_", "_c10d_functional::", "flash_attn::_flash_attn_")
_BATCHED = frozenset({"aten::bmm", "aten::baddbmm"})
_HEAD_DIM = 256
"""Attention heads are at most this wide."""


def wrap_activations(modules: dict[str, nn.Module], plan: ShardingPlan) -> None:
    """Wrap the modules that a plan recomputes or offloads, in place; `modules` then holds the wrappers.

    A module inside a recomputed one saves nothing of its own until backward, so instead of it the recomputed module
    is offloaded: what waits in host memory are that module's inputs.

    Args:
        modules: of the root, by their bare paths.

    Raises:
        ShardingError: the model recomputes activations itself already, or granularity and form do not go together.
    """
    _check(modules, plan)
    for path in plan.recompute:
        wrapper = RecomputeWrapper(
            modules[path],
            plan.full_path(path),
            reentrant=plan.use_reentrant,
            selective=plan.recompute_granularity == "selective",
        )
        modules[path] = _replace(modules, path, wrapper)
    offloaded = offloaded_modules(plan)
    if not offloaded:
        return
    accelerator = Accelerator.current()
    offloader = None if accelerator.type == "cpu" else Offloader(accelerator)
    if offloader is None:
        log.info("offload_activations has no effect on a CPU: activations are in host memory already.")
    for path in offloaded:
        modules[path] = _replace(modules, path, OffloadWrapper(modules[path], offloader))


def offloaded_modules(plan: ShardingPlan) -> tuple[str, ...]:
    """Paths of the modules that are offloaded: those of the plan, with recomputed modules in place of what lies
    inside them, and without what lies inside another.
    """
    lifted = dict.fromkeys(
        next((outer for outer in plan.recompute if is_inside(path, outer)), path)
        for path in plan.offload_activations
    )
    return tuple(
        path for path in lifted if not any(path != other and is_inside(path, other) for other in lifted)
    )


class RecomputeWrapper(CheckpointWrapper):
    """A module whose activations are computed again in the backward pass.

    Tensors may be anywhere in its arguments and results, in tuples and dicts, positional or named; all of them are
    differentiated. Random numbers are drawn again as they were.

    Args:
        module: what is wrapped.
        name: of the module, for messages.
        reentrant: the older form. A call in which no input needs a gradient takes the newer one: the older would
            leave the module's parameters without gradients.
        selective: keep the results of matrix products, attention, convolutions and collectives.
    """

    def __init__(
        self, module: nn.Module, name: str, *, reentrant: bool = False, selective: bool = False
    ) -> None:
        super().__init__(module, CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT)
        self._name = name
        self._contexts: dict[str, Any] = {}
        if selective:
            self._contexts["context_fn"] = _selective_contexts
        self._noted: set[str] = set()
        self._seen = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module.

        Raises:
            ShardingError: it is given a cache with contents, which the second run would extend again.
        """
        module = self._checkpoint_wrapped_module
        if not torch.is_grad_enabled():
            return module(*args, **kwargs)
        if not self._seen:
            self._seen = True
            self._look_for_own_checkpointing()
        leaves, inputs = tree_flatten(self._without_caches(args, kwargs))
        if self.checkpoint_impl is CheckpointImpl.REENTRANT:
            if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
                return _reentrant(module, leaves, inputs)
            self._note(
                "no input needs a gradient, with which the reentrant form of recomputation would give its "
                "parameters none; it is recomputed in the newer form"
            )

        def run(*flat: Any) -> Any:
            given, named = tree_unflatten(list(flat), inputs)
            return module(*given, **named)

        return checkpoint(run, *leaves, use_reentrant=False, **self._contexts)

    def _without_caches(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take out caches of keys and values: a layer appends to them, and would do so again when it runs again.
        Training has no use for them; but libraries make one by default, in the model's own forward.
        """
        found = [value for value in (*args, *kwargs.values()) if _is_cache(value)]
        if not found:
            return args, kwargs
        if any(_length(cache, self._checkpoint_wrapped_module) for cache in found):
            raise ShardingError(
                f'recompute_modules: "{self._name}" is called with a cache of keys and values that is not empty, '
                "which cannot be recomputed; call the model with use_cache=False, or take the module out of the list."
            )
        self._note("it is recomputed, so its cache of keys and values is left out (use_cache=False)")
        named = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
        if "use_cache" in named:
            named["use_cache"] = False
        return tuple(None if _is_cache(value) else value for value in args), named

    def _look_for_own_checkpointing(self) -> None:
        inside = _own_checkpointing(self._checkpoint_wrapped_module.modules())
        if inside is not None:
            self._note(
                f"its {inside} recomputes activations itself (gradient_checkpointing), so they are computed three "
                "times"
            )

    def _note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            log.warning("%s: %s.", self._name, text)


def keep_expensive(_: Any, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """What selective recomputation keeps: results of matrix products, attention, convolutions and collectives.

    Attention that is not fused makes its scores by a batched product of two narrow matrices (heads of at most 256).
    They are larger than both and cheap to make again, so they are not kept.
    """
    if not _may_be_kept(operation):
        return CheckpointPolicy.PREFER_RECOMPUTE
    name = _name(operation)
    if name.startswith("_c10d_functional::") and (name.endswith(("_", "_out", "wait_tensor"))):
        return CheckpointPolicy.PREFER_RECOMPUTE  # in place, or without a result of their own
    if name in _BATCHED:
        a, b = args[-2:]
        result = a.shape[0] * a.shape[1] * b.shape[2]
        if a.shape[2] <= _HEAD_DIM and result > a.numel() + b.numel():
            return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


@functools.cache  # each operation of a model comes here many times a step
def _may_be_kept(operation: Any) -> bool:
    name = _name(operation)
    return name in _KEPT or name.startswith(_KEPT_BEGINNINGS)


def _name(operation: Any) -> str:
    # By name, as not every version and device has every operation.
    name: str = operation.name()
    return name.partition(".")[0]


class _OnlyKept(TorchDispatchMode):
    """Shows one of torch's selective contexts only operations that may be kept.

    torch counts all operations in forward and expects each of them again. FSDP2 units inside the recomputed module do
    different ones the second time: what is gathered already is not gathered again.
    """

    # For flex_attention, which is an operation of a higher order.
    supports_higher_order_operators = True

    def __init__(self, context: Any) -> None:
        super().__init__()
        self._context = context

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's own."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _may_be_kept(func):
            return func(*args, **(kwargs or {}))
        return self._context.__torch_dispatch__(func, types, args, kwargs)


def _selective_contexts() -> tuple[_OnlyKept, _OnlyKept]:
    forward, recomputation = create_selective_checkpoint_contexts(keep_expensive)
    return _OnlyKept(forward), _OnlyKept(recomputation)


def _reentrant(module: nn.Module, leaves: list[Any], inputs: TreeSpec) -> Any:
    """The older form sees only tensors that are arguments or results themselves, so it gets no other."""
    results: list[TreeSpec] = []

    def run(*flat: Any) -> tuple[Any, ...]:
        given, named = tree_unflatten(list(flat), inputs)
        values, spec = tree_flatten(module(*given, **named))
        results.append(spec)
        return tuple(values)

    values = checkpoint(run, *leaves, use_reentrant=True)
    return tree_unflatten(list(values), results[0])


def _check(modules: dict[str, nn.Module], plan: ShardingPlan) -> None:
    if not plan.recompute:
        return
    if plan.recompute_granularity == "selective" and plan.use_reentrant:
        raise ShardingError(
            "recompute_granularity: selective cannot be done with use_reentrant: true; take use_reentrant out."
        )
    own = _own_checkpointing(modules.values())
    if own is not None:
        raise ShardingError(
            f'recompute_modules: "{plan.full_path(plan.recompute[0])}" is to be recomputed, but {own} of this model '
            "recomputes activations itself; do not call gradient_checkpointing_enable() (diffusers: "
            "enable_gradient_checkpointing()), or write recompute_modules: []."
        )


def _own_checkpointing(modules: Iterable[nn.Module]) -> str | None:
    """The class of a module whose library recomputes it; transformers and diffusers both say so by this name."""
    return next(
        (type(m).__name__ for m in modules if getattr(m, "gradient_checkpointing", False) is True), None
    )


def _is_cache(value: Any) -> bool:
    """Whether a value is a cache that modules write to, as those of transformers."""
    return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))


def _length(cache: Any, module: nn.Module) -> int:
    """Tokens that a cache has for a layer."""
    own = (getattr(m, "layer_idx", None) for m in module.modules())
    layer = next((index for index in own if isinstance(index, int)), 0)
    length: Callable[[int], int] = cache.get_seq_length
    return int(length(layer))


def _replace(modules: dict[str, nn.Module], path: str, wrapped: nn.Module) -> nn.Module:
    parent, _, name = path.rpartition(".")
    # ModuleList and ModuleDict keep their members under such names too.
    setattr(modules[parent], name, wrapped)
    return wrapped
