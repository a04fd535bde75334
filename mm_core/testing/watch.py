"""Which files of weights and connections a piece of code opens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".npy", ".distcp")
_watching: list[list[str]] = []
_installed = False


@contextmanager
def watch_files() -> Iterator[list[str]]:
    """Collect what is opened meanwhile: "reads /x/model.safetensors", "connects to host".

    Python's audit events tell; safetensors reads in Rust, past them, so its function is watched too.
    """
    import safetensors
    import safetensors.torch

    global _installed
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True
    seen: list[str] = []
    _watching.append(seen)
    places: list[Any] = [safetensors, safetensors.torch]
    real = safetensors.safe_open

    def safe_open(filename: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(f"reads {filename}")
        return real(filename, *args, **kwargs)

    for place in places:
        place.safe_open = safe_open
    try:
        yield seen
    finally:
        for place in places:
            place.safe_open = real
        _watching.remove(seen)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    # An audit hook stays for the life of the process, so it costs nothing while nobody watches.
    if not _watching:
        return
    if event == "open" and str(args[0]).endswith(_SUFFIXES):
        _watching[-1].append(f"reads {args[0]}")
    elif event in ("socket.connect", "socket.getaddrinfo"):
        _watching[-1].append(f"connects to {args[-1] if event == 'socket.connect' else args[0]}")
