"""The matrix products of many experts as one operation: `torch.nn.functional.grouped_mm`, where torch offers it.

Its twin, one product an expert, runs elsewhere, and is what it is tested against.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

log = logging.getLogger(__name__)

_even: ContextVar[bool] = ContextVar("even", default=False)
_FORM = ("has_gate", "has_bias", "is_transposed")
_GROUPED = (torch.bfloat16, torch.float16, torch.float32)


def is_grouped_form(module: nn.Module) -> bool:
    """Whether `grouped_experts` computes what a module of experts would.

    Those are modules in the form of transformers' experts: `gate_up_proj` `[E, 2I, H]` (or transposed) and `down_proj`
    `[E, H, I]` without biases, a gate between them, and no other implementation chosen in the configuration.
    """
    attributes = vars(module)
    return (
        all(name in attributes for name in _FORM)
        and bool(attributes["has_gate"])
        and not attributes["has_bias"]
        and not attributes.get("has_post_expert_norm", False)
        and set(module._parameters) == {"gate_up_proj", "down_proj"}
        and callable(getattr(module, "_apply_gate", None))
        and getattr(attributes.get("config"), "_experts_implementation", None) in (None, "grouped_mm")
    )


def grouped_experts(module: Any, rows: torch.Tensor, expert: torch.Tensor, experts: int) -> torch.Tensor:
    """Run each row through its expert.

    Args:
        module: for which `is_grouped_form` is true, with plain tensors as parameters.
        rows: `[R, H]`, R > 0.
        expert: of each row, `[R]`, 0 to `experts` - 1, in any order.

    Returns:
        `[R, H]`.
    """
    order = torch.argsort(expert, stable=True)
    ends = tokens_of_experts(expert, experts).cumsum(0).to(torch.int32)  # [experts]
    up, down = module.gate_up_proj, module.down_proj
    if not module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    product = product_for(rows.to(up.dtype), up, down)
    gated = module._apply_gate(product(rows[order].to(up.dtype), up, ends))  # [R, I]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return product(gated, down, ends)[place].to(rows.dtype)


@contextmanager
def even_load() -> Iterator[None]:
    """Within it all experts are taken to get equally many tokens, and no value is looked at: for tracing with tensors that
    have none. Products are taken to be grouped where all devices can: in bf16, fp16 and fp32, of rows of whole 16 bytes.
    """
    token = _even.set(True)
    try:
        yield
    finally:
        _even.reset(token)


def is_load_even() -> bool:
    """Whether `even_load` holds."""
    return _even.get()


def evenly(number: int, parts: int) -> list[int]:
    """Sizes of equal parts, the first ones larger by one where the number does not divide."""
    return [number // parts + (i < number % parts) for i in range(parts)]


def tokens_of_experts(expert: torch.Tensor, experts: int) -> torch.Tensor:
    """How often each expert occurs, int64 `[experts]`; unlike `bincount` without waiting for the device."""
    flat = expert.reshape(-1)
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat, dtype=torch.int64)
    )


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply rows that are sorted by group with the matrix of their group, in one operation.

    Args:
        rows: `[R, K]`.
        weights: `[groups, K, N]`.
        ends: where each group ends, int32 `[groups]`; groups may be empty.

    Returns:
        `[R, N]`.
    """
    return F.grouped_mm(rows, weights, offs=ends)


def separate_products(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The twin of `grouped_product`: one product a group. The host waits for the device to know the sizes."""
    own = ends.diff(prepend=ends.new_zeros(1))
    sizes = evenly(len(rows), len(weights)) if is_load_even() else own.tolist()
    parts = zip(rows.split(sizes), weights.unbind(), strict=True)
    return torch.cat([part @ weight for part, weight in parts])


def product_for(rows: torch.Tensor, *weights: torch.Tensor) -> Any:
    """`grouped_product` if it can be used for these tensors, else `separate_products`; said once in the log."""
    if is_load_even():  # nothing is tried out in a trace
        whole = all(size * rows.itemsize % 16 == 0 for weight in weights for size in weight.shape[1:])
        return grouped_product if whole and rows.dtype in _GROUPED else separate_products
    for weight in weights:
        shape, strides = tuple(weight.shape[1:]), weight.stride()[1:]
        problem = _grouped_problem(rows.device, rows.dtype, shape, strides[0] < strides[1])
        if problem is not None:
            _tell(f"experts: one matrix product an expert, since grouped_mm cannot be used: {problem}")
            return separate_products
    _tell("experts: grouped matrix products (torch.nn.functional.grouped_mm)")
    return grouped_product


@functools.cache
def _tell(text: str) -> None:
    log.info("%s", text)


@functools.cache
def _grouped_problem(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
) -> str | None:
    """Why grouped products cannot be used for matrices of a shape; found out by trying, forward and backward. Which types,
    sizes and devices there are differs between releases of torch.
    """
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has none"

    def attempt() -> None:
        with torch.enable_grad():
            rows = torch.zeros(3, shape[0], device=device, dtype=dtype, requires_grad=True)
            stored = torch.zeros(2, *(reversed(shape) if transposed else shape), device=device, dtype=dtype)
            weights = stored.requires_grad_().transpose(1, 2) if transposed else stored.requires_grad_()
            ends = torch.tensor([0, 3], device=device, dtype=torch.int32)
            product = F.grouped_mm(rows, weights, offs=ends)
            product.backward(torch.zeros_like(product))

    # In a thread of its own: what watches this one, as recomputation does, would take the attempt for a part of the model.
    with ThreadPoolExecutor(1) as thread:
        error = thread.submit(attempt).exception()
    if error is None:
        return None
    if not isinstance(error, RuntimeError | NotImplementedError):
        raise error
    return " ".join(str(error).split())[:200]
