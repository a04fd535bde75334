"""Which of Megatron-Core, Megatron-LM's training package and MindSpeed are here, and their import. Imports no torch
by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from mm_registry.errors import UserError

#: Without its dependencies: torch and numpy are here already, in the versions that were chosen for the device.
INSTALL = "pip install --no-deps megatron-core==0.16.1"


def megatron_available() -> bool:
    """Return whether `megatron.core` can be found. It is not imported, which takes seconds."""
    return _found("megatron.core")


def megatron_training_available() -> bool:
    """Return whether `megatron.training` can be found: a source checkout, as the wheels hold `megatron.core` alone."""
    return _found("megatron.training")


def mindspeed_available() -> bool:
    """Return whether MindSpeed can be found; it is installed from source, beside torch-npu."""
    return _found("mindspeed")


def describe() -> list[tuple[str, str | None, str]]:
    """Return name, version and meaning of each package, for `mm doctor`; the version is None where it is absent, and
    `source checkout` where the installed files say none.
    """
    return [
        (
            "megatron-core",
            _version("megatron-core", megatron_available()),
            f"optional: Megatron's layers, parallel state and TransformerConfig in your own code; {INSTALL}",
        ),
        (
            "megatron.training",
            "source checkout" if megatron_training_available() else None,
            "optional: its get_args() returns the job's arguments too; a checkout of Megatron-LM on PYTHONPATH",
        ),
        (
            "mindspeed",
            _version("mindspeed", mindspeed_available()),
            "optional: adapts Megatron-Core to Ascend NPUs; a checkout of MindSpeed, not the placeholder on PyPI",
        ),
    ]


def megatron_module(name: str = "megatron.core") -> ModuleType:
    """Import Megatron-Core or one of its modules. On an NPU, MindSpeed adapts it first where that is installed.

    Raises:
        UserError: it is not installed, or cannot be imported here.
    """
    if not megatron_available():
        raise UserError(f"Megatron-Core is not installed, and this needs it: {INSTALL}")
    adapt()
    return _imported(name, "Megatron-Core", INSTALL)


def adapt() -> bool:
    """Let MindSpeed adapt Megatron-Core to an NPU. Return whether it did: elsewhere there is nothing to adapt.

    Raises:
        UserError: MindSpeed is installed, and cannot be imported.
    """
    from mm_core.accelerator import Accelerator

    if Accelerator.current().type != "npu" or not mindspeed_available():
        return False
    _imported("mindspeed.megatron_adaptor", "MindSpeed", "its releases name the Megatron-Core that they fit")
    return True


def _imported(name: str, what: str, mend: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # what an optional package of others raises on the wrong machine is up to it
        raise UserError(
            f"{what} cannot be imported ({name}: {type(error).__name__}: {error}); {mend}"
        ) from error


def _found(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # noqa: BLE001 - there is no `megatron`, or another one whose code fails: Megatron's has none
        return False


def _version(distribution: str, found: bool) -> str | None:
    if not found:
        return None
    import importlib.metadata  # here, because every job imports this module and few ask for versions

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "source checkout"
