"""`torch.npu` of the pretend NPU: what torch, FSDP2 and MM Zoo ask of a device's module."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import pretend_npu_library as library
import torch

Device = torch.device | int | str | None


def _index(device: Device) -> int:
    if device is None:
        return int(library.current_device())
    if isinstance(device, int):
        return device if device >= 0 else int(library.current_device())
    index = torch.device(device).index
    return int(library.current_device()) if index is None else index


# -- devices


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None:
    pass


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return int(library.device_count())


def current_device() -> int:
    return int(library.current_device())


def set_device(device: Device) -> None:
    library.set_device(_index(device))


def synchronize(device: Device = None) -> None:
    current_stream(device).synchronize()


class device:  # noqa: N801 - torch's own name for it
    """Make a device the current one, inside."""

    def __init__(self, device: Device) -> None:
        self._inside = _index(device)
        self._before = self._inside

    def __enter__(self) -> None:
        self._before = current_device()
        library.set_device(self._inside)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        library.set_device(self._before)


# -- streams and events


class Stream(torch.Stream):
    """torch's own stream, on an NPU."""

    def __new__(cls, device: Device = None, priority: int = 0, **known: Any) -> Stream:
        if known:  # stream_id, device_index, device_type: a stream that is there already
            return super().__new__(cls, **known)
        return super().__new__(cls, device=f"npu:{_index(device)}", priority=priority)


class Event(torch.Event):
    """torch's own event, on an NPU."""

    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> Event:
        return super().__new__(cls, device="npu", enable_timing=enable_timing)


def current_stream(device: Device = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def default_stream(device: Device = None) -> Stream:
    return Stream(stream_id=0, device_index=_index(device), device_type=_device_type())


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


def stream(stream: torch.Stream) -> AbstractContextManager[Any]:
    return stream


def _device_type() -> int:
    return int(torch.accelerator.current_stream(0).device_type)


# -- memory


def memory_allocated(device: Device = None) -> int:
    return int(library.memory_bytes(_index(device))[0])


def max_memory_allocated(device: Device = None) -> int:
    return int(library.memory_bytes(_index(device))[1])


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def reset_peak_memory_stats(device: Device = None) -> None:
    library.reset_peak_memory(_index(device))


def empty_cache() -> None:
    pass


# -- random numbers


def _generator(device: Device) -> torch.Generator:
    return library.default_generator(_index(device))


def manual_seed(seed: int) -> None:
    _generator(None).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _generator(index).manual_seed(seed)


def initial_seed() -> int:
    return _generator(None).initial_seed()


def get_rng_state(device: Device = None) -> torch.Tensor:
    return _generator(device).get_state()


def set_rng_state(state: torch.Tensor, device: Device = None) -> None:
    _generator(device).set_state(state)


# -- types


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]
