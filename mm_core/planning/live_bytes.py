"""How much memory a process' tensors take, exactly and on any device: their storages are counted, not the allocator's pages."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations touch while it is entered, until they are freed.

    Tensors on the meta device take nothing. What a kernel allocates and frees inside one operation is not seen.

    Args:
        ignored: tensors that do not count, such as a model's parameters.
        ignored_results: operations whose results do not count.

    Attributes:
        peak: the most that were alive at once since the last `reset_peak()`.
    """

    def __init__(self, ignored: Iterable[torch.Tensor] = (), ignored_results: Collection[Any] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ignored: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ignored_results = ignored_results
        for tensor in ignored:
            self._watch(tensor, self._ignored)

    @property
    def now(self) -> int:
        """Bytes alive."""
        # Each time anew: FSDP2 frees gathered parameters by shrinking their storages to nothing.
        alive = [reference() for reference in self._storages.values()]
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def ignore(self, tensor: torch.Tensor) -> None:
        """Count a tensor no more, such as one that stands for host memory."""
        self._watch(tensor, self._ignored)
        self._storages.pop(id(tensor.untyped_storage()), None)

    def reset_peak(self) -> None:
        """Begin a new peak at what is alive."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # its local tensors come by here
        result = func(*args, **(kwargs or {}))
        if func in self._ignored_results:
            for leaf in tree_leaves(result):
                self._watch(leaf, self._ignored)
        for leaf in tree_leaves((args, kwargs, result)):
            self._watch(leaf, self._storages)
        self.peak = max(self.peak, self.now)
        return result

    def _watch(self, tensor: Any, storages: dict[int, weakref.ref[torch.UntypedStorage]]) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = id(storage)  # one object as long as the memory lives
        if key not in storages and key not in self._ignored:
            storages[key] = weakref.ref(storage, lambda _: storages.pop(key, None))
