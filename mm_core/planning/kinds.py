"""When two calls of two units compute the same: of what kind the units are, and what they are given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_INDEX_NAMES = ("idx", "index", "layer", "name", "prefix", "path")


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor looks like; `storage` counts the storages of its group in the order in which they appear."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    requires_grad: bool
    storage: int

    def make(self) -> torch.Tensor:
        """A new tensor like it, on a storage of its own."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype)


def describe(tensors: Iterable[torch.Tensor]) -> list[TensorSpec]:
    """The specs of tensors, which say which of them share memory."""
    storages: dict[int, int] = {}
    return [
        TensorSpec(
            tuple(t.size()),
            tuple(t.stride()),
            t.storage_offset(),
            t.dtype,
            t.requires_grad,
            storages.setdefault(id(t.untyped_storage()), len(storages)),
        )
        for t in tensors
    ]


def structure_of(module: nn.Module) -> Any:
    """What decides how a module computes: classes, plain attributes, shapes and dtypes; not which of its kind it is."""
    parts: list[Any] = []
    for path, part in module.named_modules():
        plain = tuple(
            (key, value)
            for key, value in sorted(vars(part).items())
            if isinstance(value, bool | int | float | str | tuple | None)
            and not any(word in key for word in _INDEX_NAMES)
            and _is_plain(value)
        )
        own = tuple(
            (key, tuple(t.shape), t.dtype, t.requires_grad)
            for key, t in (*part._parameters.items(), *part._buffers.items())
            if t is not None
        )
        parts.append((path, type(part), plain, own))
    return tuple(parts)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside its wrappers."""
    while (inner := getattr(module, "_checkpoint_wrapped_module", None)) is not None:
        module = inner
    return module


def _is_plain(value: Any) -> bool:
    return (
        all(map(_is_plain, value))
        if isinstance(value, tuple)
        else isinstance(value, bool | int | float | str | None)
    )


def constant_of(leaf: Any) -> Any:
    """What an argument that is no traced tensor means for a computation."""
    if isinstance(leaf, torch.Tensor):  # with real values, such as lengths; shapes may follow from them
        return tuple(leaf.shape), leaf.dtype, hash(bytes(leaf.contiguous().numpy()))
    return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf)
