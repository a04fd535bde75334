"""How much memory a process' tensors take, exactly and on any device: their storages are counted, not the allocator's pages."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations touch while it is entered, until they are freed.

    Tensors on the meta device take nothing. What a kernel allocates and frees inside one operation is not seen.

    Attributes:
        peak: the most that were alive at once since the last `reset_peak()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def now(self) -> int:
        """Bytes alive."""
        # Each time anew: FSDP2 frees gathered parameters by shrinking their storages to nothing.
        alive = [reference() for reference in self._storages.values()]
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def reset_peak(self) -> None:
        """Begin a new peak at what is alive."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # its local tensors come by here
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._watch(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # one object as long as the memory lives
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key, None))
