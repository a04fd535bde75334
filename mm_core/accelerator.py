"""The device of a process: the only file that tells cpu, cuda and npu apart.

Everything else asks an `Accelerator` for its device, its backend of communication, its memory and its
generators.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import random
import resource
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mm_core.config.environment import read, whole_number
from mm_registry.errors import UserError

log = logging.getLogger(__name__)

TYPES = ("cuda", "npu", "cpu")
_COLLECTIVES = {"cuda": "nccl", "npu": "hccl"}
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_DTYPES = {
    "fp64": torch.float64,
    "float64": torch.float64,
    "double": torch.float64,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
}


def parse_dtype(name: str) -> torch.dtype:
    """The floating-point type of a configuration's spelling: `bf16`, `fp32`, `fp16`, `fp64` and torch's long
    names.

    Raises:
        UserError: there is no such type.
    """
    dtype = _DTYPES.get(name.lower().removeprefix("torch."))
    if dtype is None:
        raise UserError(f'"{name}" is no dtype; use one of bf16, fp32, fp16, fp64.')
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The short spelling: `bf16` for `torch.bfloat16`."""
    return next(
        (name for name, value in _DTYPES.items() if value is dtype), str(dtype).removeprefix("torch.")
    )


@dataclass(frozen=True)
class Accelerator:
    """The device that this process computes on.

    Args:
        type: `cpu`, `cuda` or `npu`.
        local_rank: which of the machine's devices; without meaning on a CPU.
    """

    type: str = "cpu"
    local_rank: int = field(default_factory=lambda: whole_number("LOCAL_RANK", 0))

    @classmethod
    def current(cls, requested: str | None = None) -> Accelerator:
        """The accelerator found here: CUDA, else NPU, else the CPU.

        Args:
            requested: `cpu`, `cuda` or `npu` to insist on one; the environment's `MM_DEVICE` by default.

        Raises:
            UserError: the requested one is unknown or cannot be used here; the message says why.
        """
        requested = requested or read("MM_DEVICE") or None
        if requested is not None:
            if requested not in TYPES:
                raise UserError(f'MM_DEVICE: "{requested}" is no device type; use one of {", ".join(TYPES)}.')
            reason = _why_not(requested)
            if reason is not None:
                raise UserError(f'Device "{requested}" was asked for, but {reason}.')
            return cls(requested)
        for type_ in TYPES:
            reason = _why_not(type_)
            if reason is None:
                return cls(type_)
            if type_ == "npu" and _torch_npu_installed():
                log.warning("torch_npu is installed, but %s; the NPU is not used.", reason)
        return cls("cpu")

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return torch.device("cpu") if self.type == "cpu" else torch.device(self.type, self.local_rank)

    @property
    def backend(self) -> str:
        """Backend of communication; it always has a gloo side for CPU tensors."""
        if self.type == "cpu":
            return "gloo"
        return f"cpu:gloo,{self.type}:{_COLLECTIVES[self.type]}"

    @property
    def has_pinned_memory(self) -> bool:
        """Whether host memory can be pinned for copies to the device."""
        return self.type != "cpu"

    def use(self) -> None:
        """Make this rank's device the current one.

        Raises:
            UserError: this machine has fewer devices than local ranks.
        """
        if self.type == "cpu":
            return
        count = self._module.device_count()
        if self.local_rank >= count:
            raise UserError(
                f"Local rank {self.local_rank} has no {self.type} device: this machine has {count}. "
                f"Start {count} processes on it (--nproc-per-node {count})."
            )
        self._module.set_device(self.local_rank)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.type != "cpu":
            self._module.synchronize()

    def max_memory_bytes(self) -> int:
        """Peak memory in bytes: of the device's allocator, or the peak resident set of this process on a
        CPU.
        """
        if self.type != "cpu":
            return int(self._module.max_memory_allocated())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # Linux counts in KiB

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether kernels for this floating-point type exist on the device."""
        if dtype in (torch.float32, torch.float16):
            return True
        if dtype is torch.bfloat16:
            return self.type != "cuda" or bool(torch.cuda.is_bf16_supported())
        return dtype is torch.float64 and self.type != "npu"

    def deterministic(self) -> None:
        """Let torch run deterministic kernels only, in this process; an operation that has none raises.

        Call it before anything is computed: cuBLAS reads its workspace setting once, when it starts.
        """
        # Without it cuBLAS may choose another workspace, and with it another order of sums, on each stream.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    def seed_all(self, seed: int) -> None:
        """Seed the global generators: torch on CPU and device, NumPy and Python."""
        torch.manual_seed(seed)  # devices too
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def rng_state(self) -> dict[str, torch.Tensor]:
        """States of the global generators: `torch.cpu`, `torch.<device>`, `numpy.*`, `python.*`."""
        _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        version, words, gauss_next = random.getstate()
        states = {
            "torch.cpu": torch.get_rng_state(),
            "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "numpy.position": torch.tensor([position, has_gauss]),
            "numpy.gauss": torch.tensor([gauss], dtype=torch.float64),
            "python.words": torch.tensor([version, *words]),
            "python.gauss": torch.tensor([] if gauss_next is None else [gauss_next], dtype=torch.float64),
        }
        if self.type != "cpu":
            states[f"torch.{self.type}"] = self._module.get_rng_state(self.local_rank)
        return states

    def set_rng_state(self, states: dict[str, torch.Tensor]) -> None:
        """Put back what `rng_state()` returned.

        A device's state is left alone when it comes from another type of device.
        """
        torch.set_rng_state(states["torch.cpu"])
        position, has_gauss = states["numpy.position"].tolist()
        keys = states["numpy.keys"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy.gauss"].item()))
        version, *words = states["python.words"].tolist()
        gauss = states["python.gauss"].tolist()
        random.setstate((version, tuple(words), gauss[0] if gauss else None))
        device_state = states.get(f"torch.{self.type}")
        if self.type != "cpu" and device_state is not None:
            self._module.set_rng_state(device_state, self.local_rank)

    def init_process_group(self, backend: str | None = None, timeout_minutes: float = 10) -> None:
        """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

        A process without them becomes a group of one, over an in-process store: sharding and checkpoints
        need no second code path. A group that already exists is kept.

        Args:
            backend: what the user asked for (`--distributed-backend`); the accelerator's own by default.
                `nccl` and `hccl` alone are completed with gloo for CPU tensors.
            timeout_minutes: how long a collective may wait for the other ranks.

        Raises:
            UserError: the variables are incomplete or wrong, or the backend is missing here.
        """
        if dist.is_initialized():
            return
        self.use()
        backend = _complete_backend(self, backend)
        timeout = timedelta(minutes=timeout_minutes)
        # Passing the device lets NCCL and HCCL connect at once, and says which device a rank owns.
        device = None if self.type == "cpu" else self.device
        if read("RANK") is None and read("WORLD_SIZE") is None:
            store = dist.HashStore()
            dist.init_process_group(
                backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=device
            )
            return
        missing = [name for name in _LAUNCHER_VARIABLES if read(name) is None]
        if missing:
            raise UserError(
                f"The environment has {', '.join(n for n in _LAUNCHER_VARIABLES if read(n) is not None)} but not "
                f"{', '.join(missing)}: "
                "start with torchrun or --nproc-per-node, or unset them to run one process."
            )
        rank, world = whole_number("RANK", 0), whole_number("WORLD_SIZE", 1)
        if not 0 <= rank < world:
            raise UserError(f"RANK={rank} is outside WORLD_SIZE={world}.")
        dist.init_process_group(
            backend, init_method="env://", rank=rank, world_size=world, timeout=timeout, device_id=device
        )

    @property
    def _module(self) -> Any:
        return getattr(torch, self.type)


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _complete_backend(accelerator: Accelerator, backend: str | None) -> str:
    """What torch understands, from what the user wrote; parts for devices that are not here are dropped."""
    if backend is None:
        return accelerator.backend
    parts = dict(_split_backend(part, accelerator) for part in backend.split(","))
    wanted = parts.get(accelerator.type)
    if wanted not in ("gloo", _COLLECTIVES.get(accelerator.type)):
        raise UserError(
            f'--distributed-backend "{backend}" has nothing for the {accelerator.type} device of this '
            f'machine; use "{accelerator.backend}" or leave the flag out.'
        )
    return "gloo" if accelerator.type == "cpu" else f"cpu:gloo,{accelerator.type}:{wanted}"


def _split_backend(part: str, accelerator: Accelerator) -> tuple[str, str]:
    device, colon, name = part.strip().partition(":")
    if colon:
        return device, name
    # Scripts written for NPUs pass "nccl" and rely on it being mapped; on a CPU only gloo can be meant.
    owners = {collective: type_ for type_, collective in _COLLECTIVES.items()}
    if device in owners:
        return accelerator.type, "gloo" if accelerator.type == "cpu" else _COLLECTIVES[accelerator.type]
    return accelerator.type, device


def _why_not(type_: str) -> str | None:
    """Why a device type cannot be used here; `None` if it can."""
    if type_ == "cpu":
        return None
    if type_ == "cuda":
        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    npu: ModuleType | None = getattr(torch, "npu", None)
    if npu is None:
        if not _torch_npu_installed():
            return "torch_npu is not installed (pip install torch-npu, beside a matching CANN)"
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            # A missing CANN shows itself as any of the three, often as libhccl.so.
            return (
                f"torch_npu cannot be loaded ({error}); check that CANN is installed and its set_env.sh "
                "was sourced"
            )
        npu = getattr(torch, "npu", None)
    return None if npu is not None and npu.is_available() else "torch_npu finds no NPU"


def _torch_npu_installed() -> bool:
    return importlib.util.find_spec("torch_npu") is not None
