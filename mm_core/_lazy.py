"""Lazy exports (PEP 562), so that a package can offer names without importing what they need."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package that exports names from its submodules.

    Args:
        package: the package's `__name__`.
        exports: public name -> absolute module that defines it.

    A name is imported when it is first asked for: `import mm_core.sharding.policy` runs
    `mm_core/sharding/__init__.py` but none of its torch-importing siblings.
    """

    def getattr_(name: str) -> Any:
        module = exports.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module), name)
        importlib.import_module(package).__dict__[name] = value
        return value

    def dir_() -> list[str]:
        return sorted({*importlib.import_module(package).__dict__, *exports})

    return getattr_, dir_
