"""Frozen modules that rest in host memory and come to the device while they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Parked:
    """Modules whose parameters and buffers are on the device inside `on_device()` only.

    They never change, so that leaving the device is free: nothing is copied back, their device memory is given up.

    Args:
        modules: frozen; they are in host memory from now on.
        device: where they compute.

    Attributes:
        trips: how often they came to the device.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self.device = device
        self.trips = 0
        self._inside = 0
        self._tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        # Page-locked memory makes the copy to the device several times faster.
        pinned = device.type != "cpu" and torch.accelerator.is_available()
        self._host = [t.data.cpu().pin_memory() if pinned else t.data.cpu() for t in self._tensors]
        self._rest()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The modules are on the device inside; what is nested makes no further trip."""
        if not self._inside:
            self.trips += 1
            for tensor, host in zip(self._tensors, self._host, strict=True):
                tensor.data = host.to(self.device, non_blocking=True)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._rest()

    def _rest(self) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host
