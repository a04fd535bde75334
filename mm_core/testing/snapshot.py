"""The state of a process that importing a plugin must leave alone. Looks at torch only where it is imported."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Set by torch itself when its compiler is imported, which diffusers does.
_TORCH_OWN_VARIABLES = frozenset({"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"})

_FUNCTION = "function "

Snapshot = Mapping[str, Mapping[str, Any]]
"""Kind of state -> name -> value."""


def take_snapshot() -> Snapshot:
    """Return what there is of: torch, distributed, environment, files, threads, interpreter."""
    return {
        "torch": _torch_state(),
        "distributed": _distributed_state(),
        "environment": {k: v for k, v in os.environ.items() if k not in _TORCH_OWN_VARIABLES},
        "files": {str(path.relative_to(Path.cwd())): "there" for path in sorted(Path.cwd().rglob("*"))},
        "threads": {f"{thread.name} ({thread.ident})": "running" for thread in threading.enumerate()},
        "interpreter": _interpreter_state(),
    }


def differences(before: Snapshot, after: Snapshot) -> dict[str, list[str]]:
    """Return kind -> what is different now, in words; kinds without a difference are left out. Values of environment
    variables are not told.
    """
    found: dict[str, list[str]] = {}
    for kind, now in after.items():
        old = before[kind]
        # Torch's switches are compared where torch was there before: its own values are no change.
        looked_at = old if kind == "torch" else {*old, *now}
        names = sorted(name for name in looked_at if old.get(name, _ABSENT) != now.get(name, _ABSENT))
        if names:
            found[kind] = [_words(kind, name, old, now) for name in names]
    return found


_ABSENT = object()


def _words(kind: str, name: str, old: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if kind in ("files", "threads"):
        return name
    if kind == "environment":
        what = "removed" if name not in now else "changed" if name in old else "added"
        return f"{name} ({what})"
    if name not in old or name.endswith("state") or name.startswith(_FUNCTION):
        return name
    return f"{name}: {old[name]} → {now.get(name)}"


def _torch_state() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_dtype"):
        return {}
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        **_torch_functions(torch),
        "random generator's state": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }


def _torch_functions(torch: Any) -> dict[str, Any]:
    """The functions and methods that everybody computes with: torch's own (its compiler replaces some by others), or else
    which object each is.
    """
    functional, home = torch.nn.functional, os.path.dirname(torch.__file__)
    places = {"torch": torch, "torch.Tensor": torch.Tensor, "torch.nn.functional": functional}
    places |= {
        f"torch.nn.{cls.__name__}": cls for cls in (torch.nn.Module, torch.nn.Linear, torch.nn.LayerNorm)
    }
    return {
        f"{_FUNCTION}{place}.{name}": "torch's" if _written_in(value, home) else id(value)
        for place, owner in places.items()
        for name, value in vars(owner).items()
        if callable(value) and not isinstance(value, type)
    }


def _written_in(function: Any, folder: str) -> bool:
    """Whether its code lies below a folder; what is not written in Python counts as if it did."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code is None or code.co_filename.startswith(folder)


def _distributed_state() -> dict[str, Any]:
    # torch.distributed may be imported by now and may not have been before; that alone is no difference.
    module = sys.modules.get("torch.distributed")
    started = module is not None and module.is_available() and module.is_initialized()
    return {"process group": "initialised" if started else "none"}


def _interpreter_state() -> dict[str, Any]:
    handlers = [f"{type(handler).__name__} ({id(handler)})" for handler in logging.root.handlers]
    return {
        "root logger": f"{logging.getLevelName(logging.root.level)}, handlers {', '.join(handlers) or 'none'}",
        "sys.path": list(sys.path),
        "sys.excepthook": _name_of(sys.excepthook),
        "recursion limit": sys.getrecursionlimit(),
        "SIGINT": _name_of(signal.getsignal(signal.SIGINT)),
        "SIGTERM": _name_of(signal.getsignal(signal.SIGTERM)),
        "working directory": str(Path.cwd()),
        "random module's state": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
    }


def _name_of(thing: Any) -> str:
    return getattr(thing, "__qualname__", None) or str(thing)


@contextmanager
def cuda_calls() -> Iterator[list[str]]:
    """Collect, while the block runs, what initialises CUDA; also on a machine without one, where it would fail."""
    touched: list[str] = []
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda"):
        yield touched
        return
    original = torch.cuda._lazy_init

    def spy() -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith("torch."):
            frame = frame.f_back
        touched.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        original()

    torch.cuda._lazy_init = spy
    try:
        yield touched
    finally:
        torch.cuda._lazy_init = original
