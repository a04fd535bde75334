"""A copy of tensors in host memory, which later steps do not change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from mm_core.accelerator import Accelerator

log = logging.getLogger(__name__)


class HostBuffers:
    """Host memory for the tensors of a checkpoint, kept from one to the next: making it costs more than the copy.

    It is page-locked where the device has that, and if there is enough of it.

    Args:
        accelerator: the device of the tensors.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._buffers: dict[str, torch.Tensor] = {}
        self._pins = accelerator.has_pinned_memory

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Mapping[str, torch.Tensor], Any]:
        """Copy tensors of this rank. What the current stream does later comes after the copy.

        Returns:
            The copies, each in storage of its own, good until the next call; and the event to wait for before they are
            read, `None` if they are there already.
        """
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        event = self._accelerator.new_event()
        if event is not None:
            event.record()
        return self._buffers, event

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        old = self._buffers.get(name)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        if self._pins:
            try:
                return self._accelerator.pinned_like(tensor)
            except RuntimeError as error:  # the system lets a process lock so much only
                self._pins = False
                log.warning(
                    "host memory cannot be page-locked (%s); checkpoints are copied more slowly", error
                )
        return torch.empty_like(tensor, device="cpu")
