"""Tensors that wait in host memory: the same tensor objects, whose storage is empty meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class HostStorage:
    """Sends the storages of a set of tensors to host memory, and brings them back bit by bit.

    Views and parameters stay the same objects, so that FSDP2, optimizers and averages need not know of it; none of them may
    touch the tensors meanwhile. Tensors that lie on the CPU already give up their storage as well, which is of no use but
    for tests.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[torch.UntypedStorage, torch.Tensor]] = []

    @property
    def away(self) -> bool:
        """Whether there are tensors in host memory."""
        return bool(self._sent)

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return sum(copy.nbytes for _, copy in self._sent)

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """Move storages to host memory; those that several tensors share once. Waits for the device."""
        assert not self._sent, "what waits must be brought back first"
        storages = {s.data_ptr(): s for t in tensors if (s := t.untyped_storage()).nbytes()}
        devices = {storage.device for storage in storages.values() if storage.device.type != "cpu"}
        for storage in storages.values():
            there = _bytes(storage)
            copy = torch.empty(there.shape, dtype=torch.uint8, pin_memory=bool(devices))
            copy.copy_(there, non_blocking=True)
            self._sent.append((storage, copy))
        # Gradients were allocated on a stream of FSDP's, which would not wait for the copies before it used them again.
        for device in devices:
            torch.accelerator.synchronize(device)
        for storage, copy in self._sent:
            storage.resize_(0)
            assert copy.device.type == "cpu"

    def back(self) -> None:
        """Bring everything back; nothing if nothing is away."""
        for storage, copy in self._sent:
            storage.resize_(copy.nbytes)
            _bytes(storage).copy_(copy, non_blocking=True)
        for device in {storage.device for storage, _ in self._sent if storage.device.type != "cpu"}:
            torch.accelerator.synchronize(
                device
            )  # other streams read them, and the host copies are given back
        self._sent.clear()


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as uint8 `[nbytes]`, sharing its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
