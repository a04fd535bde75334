"""A stand-in for Ascend's torch_npu: importing it adds the pretend NPU to torch, as `npu`, `torch.npu` and `hccl`.

`PRETEND_NPU_LIBRARY` names the library that `build.py` made. `PRETEND_NPU_BROKEN` makes the import fail as torch_npu
does where CANN is missing: `ImportError`, `OSError` or `RuntimeError`. With `PRETEND_NPU_REPORT`, a folder, each
process leaves there what was asked of its device.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch_npu.fused import npu_fusion_attention, npu_rms_norm

__all__ = ["npu_fusion_attention", "npu_rms_norm"]

_REASON = "libhccl.so: cannot open shared object file: No such file or directory"


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    return library


if "PRETEND_NPU_BROKEN" in os.environ:
    raise getattr(builtins, os.environ["PRETEND_NPU_BROKEN"])(_REASON)

# Imported once more, by another path, the device would be registered twice.
if "pretend_npu_library" not in sys.modules:
    library = _load(os.environ["PRETEND_NPU_LIBRARY"])
    sys.modules["pretend_npu_library"] = library
    torch.utils.rename_privateuse1_backend("npu")
    library.register_hooks()
    from torch_npu import npu

    torch._register_device_module("npu", npu)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    from torch_npu import communication, report

    communication.register()
    report.at_exit()


def _autoload() -> None:
    """What torch calls when it is imported (entry point group `torch.backends`); the import above did it all."""
