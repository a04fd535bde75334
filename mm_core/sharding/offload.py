"""Saved activations that wait for the backward pass in host memory, copied beside the computation.

While an `OffloadWrapper` runs its module, autograd hands every tensor that it saves to `Offloader`, which starts
a copy to host memory on a stream of its own. The tensor stays on the device until the next offloaded module has
run, so that the computation hardly ever waits for a copy; then the device's memory goes. The backward pass does
the reverse: when it needs the first tensor of a module, that module's tensors and those of the module before it
are on their way back. So at any time the device holds the activations of two offloaded modules, whatever their
number. The last one's never leave it: the backward pass begins with them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# The one way to know a storage again without keeping it: two tensors may have the same address one after the
# other. Functorch and torch.compile use it too.
from torch.multiprocessing.reductions import StorageWeakRef

from mm_core.accelerator import Accelerator

MIN_BYTES = 64 * 1024
"""Smaller tensors stay on the device: starting their copies costs more than they hold."""


class OffloadWrapper(ActivationWrapper):
    """A module whose saved activations are offloaded. Names of parameters and keys of the state dict are the
    module's own, as with a checkpoint wrapper.

    Args:
        module: what is wrapped; a checkpoint wrapper when the module is recomputed too, of which only the inputs
            are saved.
        offloader: shared by all wrappers of one root; None runs the module as it is.
    """

    def __init__(self, module: nn.Module, offloader: Offloader | None) -> None:
        super().__init__(module)
        self.offloader = offloader
        self._gathers: list[nn.Module] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        module = self._checkpoint_wrapped_module
        if self.offloader is None or not torch.is_grad_enabled():
            return module(*args, **kwargs)
        if self._gathers is None:
            # FSDP units inside gather their parameters later than now. Its own hook comes before this one.
            self._gathers = [m for m in module.modules() if isinstance(m, FSDPModule)]
            for unit in self._gathers:
                unit.register_forward_pre_hook(self._note_gathered)
        with self.offloader.saving(module):
            return module(*args, **kwargs)

    def _note_gathered(self, unit: nn.Module, _: Any) -> None:
        assert self.offloader is not None
        self.offloader.keep_on_device(unit)


class Offloader:
    """Copies of one root's saved activations, to host memory and back.

    Args:
        accelerator: the device that computes; on a CPU nothing is offloaded.
        min_bytes: smaller tensors stay where they are.
        force: treat the CPU's own memory as a device's. For tests.

    Attributes:
        copies, copied_bytes: copies to host memory so far.
        fetches: copies back so far.
        fetched_ahead: how many of those were under way before the backward pass reached their module.
    """

    def __init__(self, accelerator: Accelerator, *, min_bytes: int = MIN_BYTES, force: bool = False) -> None:
        self._accelerator = accelerator
        self._min_bytes = min_bytes
        self._force = force
        # Two streams, as devices copy in both directions at once.
        self._leaving_stream = accelerator.new_stream()
        self._coming_stream = accelerator.new_stream()
        self._entries: weakref.WeakValueDictionary[Any, _Entry] = weakref.WeakValueDictionary()
        self._leaving: dict[int, tuple[_Scope, _Entry]] = {}
        self._coming: dict[int, _Entry] = {}
        self._emptied: deque[tuple[Any, torch.Tensor]] = deque()
        self._scope: _Scope | None = None
        self._last: weakref.ref[_Scope] | None = None
        self._reached: weakref.ref[_Scope] | None = None
        self.copies = self.copied_bytes = self.fetches = self.fetched_ahead = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Offloader:
        """A copy of a model shares it: streams and copies under way cannot be copied."""
        return self

    @contextmanager
    def saving(self, module: nn.Module) -> Iterator[None]:
        """Offload what autograd saves inside. What left before is freed at the end."""
        if self._scope is not None:  # a module that is called inside another offloaded one
            yield
            return
        self._forget_finished()
        self._scope = _Scope(self._last)
        self.keep_on_device(module)
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            scope, self._scope = self._scope, None
            if scope.entries():
                self._last = weakref.ref(scope)
            self._free_departed(scope)

    def keep_on_device(self, module: nn.Module) -> None:
        """Leave a module's parameters and buffers alone, whose memory is not the activations'."""
        if self._scope is None:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):
                self._scope.owned.add(tensor.untyped_storage().data_ptr())

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        scope = self._scope
        assert scope is not None
        version = tensor._version
        with torch.no_grad():
            if not self._moves(tensor, scope):
                # Autograd compares no versions when there are hooks, so we do. Without detach() an output would
                # keep itself alive through its own graph.
                return _Saved(tensor.detach(), version)
            entry, first = self._entry(tensor, version, scope)
            # The same version counter, without the memory.
            witness = tensor.detach()
            witness.data = witness.new_empty(0)
        place = (tensor.size(), tensor.stride(), tensor.storage_offset() - first)
        return _Saved(witness, version, entry, scope, place)

    def _moves(self, tensor: torch.Tensor, scope: _Scope) -> bool:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return False
        if tensor.device.type != self._accelerator.type or (tensor.device.type == "cpu" and not self._force):
            return False
        if tensor.is_conj() or tensor.is_neg():  # lazy views, whose memory holds other values
            return False
        storage = tensor.untyped_storage()
        bytes_ = min(tensor.numel() * tensor.itemsize, storage.nbytes())
        return 0 < bytes_ >= self._min_bytes and storage.data_ptr() not in scope.owned

    def _entry(self, tensor: torch.Tensor, version: int, scope: _Scope) -> tuple[_Entry, int]:
        """The copy that has a tensor's elements, and where it begins in the storage. One copy serves every view."""
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.itemsize
        first, count = tensor.storage_offset(), 1
        for length, step in zip(tensor.size(), tensor.stride(), strict=True):
            count += (length - 1) * step
        if 2 * count >= size:
            first, count = 0, size
        alive = StorageWeakRef(storage)
        for start, length in ((0, size), (first, count)):
            known = self._entries.get((alive.cdata, version, tensor.dtype, start, length))
            if known is not None:
                if known.on_device is None:  # freed here, but still alive elsewhere
                    known.on_device = tensor.detach().as_strided((length,), (1,), start)
                self._leaving[id(known)] = (scope, known)
                scope.add(known)
                return known, start
        entry = _Entry(alive, tensor.detach().as_strided((count,), (1,), first))
        self._entries[alive.cdata, version, tensor.dtype, first, count] = entry
        self._send(entry)
        self._leaving[id(entry)] = (scope, entry)
        scope.add(entry)
        return entry, first

    def _send(self, entry: _Entry) -> None:
        assert entry.on_device is not None
        accelerator = self._accelerator
        entry.on_host = accelerator.pinned_like(entry.on_device)
        self._after_now(self._leaving_stream)
        with accelerator.stream(self._leaving_stream):
            entry.on_host.copy_(entry.on_device, non_blocking=True)
            entry.departure = self._mark(self._leaving_stream)
        self.copies += 1
        self.copied_bytes += entry.on_host.nbytes

    def _free_departed(self, current: _Scope | None) -> None:
        """Free device memory of all scopes but the current one; without one, only stop keeping it from being
        freed. The computation's stream waits for the copies first: what it allocates next may get their memory.
        """
        for key, (scope, entry) in list(self._leaving.items()):
            if scope is current:
                continue
            self._wait(entry.departure)
            if current is not None:
                entry.on_device = None
            del self._leaving[key]

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        if saved.witness._version != saved.version:
            shape = tuple(saved.place[0] if saved.place else saved.witness.shape)
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {shape} is at version {saved.witness._version}; expected version "
                f"{saved.version} instead."
            )
        if saved.entry is None or saved.scope is None or saved.place is None:
            return saved.witness
        with torch.no_grad():
            if self._reached is None or self._reached() is not saved.scope:
                self._reach(saved.scope)
            entry = saved.entry
            self._fetch([entry])
            if self._coming.pop(id(entry), None) is not None:
                self._wait(entry.arrival)
            assert entry.on_device is not None
            size, stride, offset = saved.place
            return entry.on_device.as_strided(size, stride, entry.on_device.storage_offset() + offset)

    def _reach(self, scope: _Scope) -> None:
        """The backward pass comes to a module: fetch its tensors, and those that it will need next."""
        self._reached = weakref.ref(scope)
        self._free_departed(None)
        self._fetch(scope.entries())
        before = scope.before()
        if before is not None:
            self.fetched_ahead += self._fetch(before.entries())

    def _fetch(self, entries: list[_Entry]) -> int:
        absent = [entry for entry in entries if entry.on_device is None]
        if not absent:
            return 0
        self._forget_finished()
        for entry in absent:
            # Allocated on the computation's stream, which frees it too; so the copy must come after what that
            # stream was given until now, which may still use the memory.
            assert entry.on_host is not None
            entry.on_device = torch.empty_like(entry.on_host, device=entry.device)
        self._after_now(self._coming_stream)
        with self._accelerator.stream(self._coming_stream):
            for entry in absent:
                assert entry.on_device is not None
                assert entry.on_host is not None
                entry.on_device.copy_(entry.on_host, non_blocking=True)
                entry.arrival = self._mark(self._coming_stream)
                self._coming[id(entry)] = entry
                self._emptied.append((entry.arrival, entry.on_host))
                entry.on_host = None
        self.fetches += len(absent)
        return len(absent)

    def _forget_finished(self) -> None:
        """Let go of memory that was kept for copies, of those that are done."""
        while self._emptied and _is_done(self._emptied[0][0]):
            self._emptied.popleft()
        for key, entry in list(self._coming.items()):
            # What the backward pass never asked for: a graph that was dropped, a module off its way.
            if self._scope is None and _is_done(entry.arrival):
                del self._coming[key]

    def _after_now(self, stream: Any) -> None:
        """Let a stream wait for all that the current one was given."""
        if stream is not None:
            stream.wait_event(self._mark(self._accelerator.current_stream()))

    def _mark(self, stream: Any) -> Any:
        event = self._accelerator.new_event()
        if event is not None:
            event.record(stream)
        return event

    def _wait(self, event: Any) -> None:
        """Let the current stream wait for a copy. The process does not."""
        if event is not None:
            self._accelerator.current_stream().wait_event(event)


class _Entry:
    """Elements of one storage, on the device, on the host, or on both while they leave."""

    __slots__ = ("__weakref__", "arrival", "departure", "device", "on_device", "on_host", "storage")

    def __init__(self, storage: StorageWeakRef, on_device: torch.Tensor) -> None:
        self.storage = storage  # keeps the key from being given to another storage
        self.device = on_device.device
        self.on_device: torch.Tensor | None = on_device
        self.on_host: torch.Tensor | None = None
        self.departure: Any = None
        self.arrival: Any = None


class _Scope:
    """One call of an offloaded module. It lives as long as something that it saved."""

    def __init__(self, last: weakref.ref[_Scope] | None) -> None:
        self.owned: set[int] = set()
        self._entries: dict[int, weakref.ref[_Entry]] = {}
        self._last = last

    def add(self, entry: _Entry) -> None:
        self._entries[id(entry)] = weakref.ref(entry)

    def entries(self) -> list[_Entry]:
        """Those that are still needed, in the order in which backward asks for them."""
        return [entry for ref in reversed(self._entries.values()) if (entry := ref()) is not None]

    def before(self) -> _Scope | None:
        """The call before this one, if backward still needs it."""
        return self._last() if self._last is not None else None


@dataclass(slots=True)
class _Saved:
    """What autograd keeps in place of a tensor.

    Args:
        witness: the tensor itself, or one without memory that shares its version counter.
        place: size, stride and offset of the tensor in the entry.
    """

    witness: torch.Tensor
    version: int
    entry: _Entry | None = None
    scope: _Scope | None = None
    place: tuple[torch.Size, tuple[int, ...], int] | None = None


def _is_done(event: Any) -> bool:
    return event is None or bool(event.query())
