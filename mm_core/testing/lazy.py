"""Modules that are imported when one of their names is first used: a check's module must not import torch,
because the list of checks is read by processes that have none.
"""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for a module until it is needed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
