"""How many bytes operations have made that are still alive: what a device would hold, told without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, it notes the storage of every result.

    Parameters and buffers of `model` do not count, and neither do buffers for copies on the host, which only
    `Accelerator.pinned_like` makes (by `empty_like`).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = (*model.parameters(), *model.buffers())
        self._others = [StorageWeakRef(tensor.untyped_storage()) for tensor in own]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                if func is torch.ops.aten.empty_like.default:
                    self._others.append(ref)
                self._made[ref.cdata] = (ref, storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes that are alive now."""
        others = {ref.cdata for ref in self._others}
        return sum(size for key, (ref, size) in self._made.items() if key not in others and not ref.expired())
