"""Which modules an import brings, and how long each took by itself."""

from __future__ import annotations

import importlib.machinery
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class ImportTimer:
    """A finder that lets the others find a module and times its execution.

    Attributes:
        self_seconds: module -> seconds of its own execution, without the modules that it imported.
    """

    def __init__(self) -> None:
        self.self_seconds: dict[str, float] = {}
        self._nested: list[float] = []  # of each module in execution, the seconds of what it imported
        self._asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if self._asking:  # a finder that asks for other modules' specs is not timed
            return None
        self._asking = True
        try:
            for finder in sys.meta_path:
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._time(spec)
                    return spec
        finally:
            self._asking = False
        return None

    def _time(self, spec: importlib.machinery.ModuleSpec) -> None:
        loader: Any = spec.loader
        execute = getattr(loader, "exec_module", None)
        # Only loaders made for this one module: built-in and frozen ones are classes that all share.
        if execute is None or isinstance(loader, type):
            return

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # a reload is not timed
            start = time.perf_counter()
            self._nested.append(0.0)
            try:
                execute(module)
            finally:
                whole = time.perf_counter() - start
                own = whole - self._nested.pop()
                self.self_seconds[spec.name] = self.self_seconds.get(spec.name, 0.0) + own
                if self._nested:
                    self._nested[-1] += whole

        try:
            loader.exec_module = exec_module
        except AttributeError:  # a loader with slots is simply not timed
            return


@contextmanager
def timed_imports() -> Iterator[ImportTimer]:
    """Time every module that is imported in the block."""
    timer = ImportTimer()
    sys.meta_path.insert(0, timer)
    try:
        yield timer
    finally:
        sys.meta_path.remove(timer)
