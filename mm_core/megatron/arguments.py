"""`megatron.training.get_args()`: where a source checkout of Megatron-LM offers it, it returns the job's arguments too
(the PyPI wheels hold `megatron.core` alone). Imports no torch by itself.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import Any

from mm_core.megatron.installed import megatron_training_available

log = logging.getLogger(__name__)
_PACKAGE = "megatron.training"
_GLOBALS = "megatron.training.global_vars"


def arguments_of_megatron() -> Any | None:
    """Return the arguments that Megatron-LM's own launcher has set, or `None`."""
    megatron = _imported(_PACKAGE)
    if megatron is None:
        return None
    try:
        return megatron.get_args()
    except AssertionError:  # its way to say that they are not initialized
        return None


def hand_over(args: Any) -> None:
    """Let `megatron.training.get_args()` return these arguments too, unless it has some of its own."""
    megatron = _imported(_GLOBALS)
    if megatron is None:
        return
    try:
        megatron.get_args()
    except AssertionError:
        megatron.set_args(args)
    else:
        log.warning("megatron.training has arguments already; its get_args() returns those, not the job's")


def _imported(name: str) -> ModuleType | None:
    """A module of `megatron.training`; `None` where it is not installed, or is broken: no job needs it."""
    if not megatron_training_available():
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - what a checkout raises on the wrong machine is up to it
        log.warning(
            "megatron.training cannot be imported (%s: %s): its get_args() knows no job",
            type(error).__name__,
            error,
        )
        return None


def take_back(args: Any) -> None:
    """Make Megatron-LM forget these arguments, if they are the ones that it has."""
    megatron = sys.modules.get(_GLOBALS)
    if megatron is not None and getattr(megatron, "_GLOBAL_ARGS", None) is args:
        megatron.set_args(None)
