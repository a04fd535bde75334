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
import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mm_core.config.devices import TYPES, VISIBLE, broken_torch_npu, communication, visible_devices
from mm_core.config.environment import read, whole_number
from mm_registry.errors import UserError

log = logging.getLogger(__name__)

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

        torch_npu is imported where it is installed, if torch did not import it already (it does, unless
        `TORCH_DEVICE_BACKEND_AUTOLOAD=0`).

        Args:
            requested: `cpu`, `cuda` or `npu` to insist on one; the environment's `MM_DEVICE` by default.

        Raises:
            UserError: the requested one is unknown or cannot be used here, and why; or torch_npu is installed and
                cannot be imported, which no run survives, whatever its device: diffusers and transformers import it.
        """
        _import_torch_npu()
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
                log.warning("torch_npu is installed, but %s.", reason)
        return cls("cpu")

    @property
    def device(self) -> torch.device:
        """The device of this rank: the one that its local rank counts to, or the only one that it may see (a
        scheduler can give each process its own).
        """
        if self.type == "cpu":
            return torch.device("cpu")
        return torch.device(self.type, 0 if self._sees_one else self.local_rank)

    @property
    def backend(self) -> str:
        """Backend of communication; it always has a gloo side for CPU tensors."""
        return communication(None, self.type)[0]

    @property
    def has_pinned_memory(self) -> bool:
        """Whether host memory can be pinned for copies to the device."""
        return self.type != "cpu"

    @property
    def forces_sum_reduction(self) -> bool:
        """Whether gradients must be reduced by plain sums, and divided in a step of their own.

        HCCL itself knows sum, product, minimum and maximum: it lacks NCCL's pre-multiplied sum, and has no mean of its
        own. FSDP2 asks for one of the two unless `set_force_sum_reduction_for_comms(True)` was called.
        """
        return self.type == "npu"

    def new_stream(self) -> Any:
        """A stream of its own on this device, for copies beside the computation; None on a CPU, which has none."""
        return None if self.type == "cpu" else self._module.Stream(device=self.device)

    def current_stream(self) -> Any:
        """The stream that this thread's operations go to; None on a CPU."""
        return None if self.type == "cpu" else self._module.current_stream(self.device)

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Inside, operations go to `stream`, from `new_stream()`; with None, nothing changes."""
        return nullcontext() if stream is None else self._module.stream(stream)

    def new_event(self) -> Any:
        """An event that one stream records and another waits for; None on a CPU, where work is done in order."""
        return None if self.type == "cpu" else self._module.Event()

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Uninitialised host memory for a copy of `tensor`: its shape, dtype and order of dimensions.

        Strides are the tensor's own, except that gaps and repeated elements (of slices, of expanded tensors) are
        packed. The memory is page-locked where the device allows it (`has_pinned_memory`), so that a copy with
        `non_blocking=True` runs beside the computation; it is plain memory otherwise.
        """
        return torch.empty_like(tensor, device="cpu", pin_memory=self.has_pinned_memory)

    def use(self) -> None:
        """Make this rank's device the current one.

        Raises:
            UserError: this machine has fewer devices than local ranks.
        """
        if self.type == "cpu":
            return
        # If it sees one device only, the other processes may see theirs.
        self.check_processes(
            1 if self._sees_one else max(self.local_rank + 1, whole_number("LOCAL_WORLD_SIZE", 1))
        )
        self._module.set_device(self.device.index)

    def check_processes(self, count: int) -> None:
        """Whether each of `count` processes of this machine has a device of its own; always, on a CPU.

        Raises:
            UserError: there are fewer devices than processes; the message says how many, and what hides the others.
        """
        if self.type == "cpu":
            return
        here = self._module.device_count()
        if count <= here:
            return
        variable = VISIBLE[self.type]
        hidden = f" ({variable}={read(variable)} hides the others)" if read(variable) is not None else ""
        raise UserError(
            f"{count} processes on this machine, but it shows {here} {self.type} "
            f"device{'' if here == 1 else 's'}{hidden}: two processes cannot share one; start at most {here} on it "
            f"(--nproc-per-node {here})."
        )

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
            states[f"torch.{self.type}"] = self._module.get_rng_state(self.device.index)
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
            self._module.set_rng_state(device_state, self.device.index)

    def init_process_group(
        self, backend: str | None = None, timeout_minutes: float = 10, store: dist.Store | None = None
    ) -> None:
        """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

        A process without them becomes a group of one, over an in-process store: sharding and checkpoints
        need no second code path. A group that already exists is kept.

        Args:
            backend: what the user asked for (`--distributed-backend`, see `communication`); the accelerator's own by
                default.
            timeout_minutes: how long a collective may wait for the other ranks.
            store: where the ranks of the variables have met already; by default they meet here.

        Raises:
            UserError: the variables are incomplete or wrong, the backend is none for this device, or two ranks of one
                machine have the same device.
        """
        if dist.is_initialized():
            return
        self.use()
        backend, said = communication(backend, self.type)
        timeout = timedelta(minutes=timeout_minutes)
        # Told its device, NCCL connects at once, and torch makes the groups of a mesh by splitting this one. HCCL is
        # not known to split; with a device torch would ask it to, and fail.
        device = self.device if self.type == "cuda" else None
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
        if said and rank == 0:
            log.warning("--distributed-backend: %s.", said)
        meeting = {"init_method": "env://"} if store is None else {"store": store}
        dist.init_process_group(
            backend, rank=rank, world_size=world, timeout=timeout, device_id=device, **meeting
        )
        if self.type != "cpu" and world > 1:
            self._check_own_device()

    def _check_own_device(self) -> None:
        """Refuse two ranks of a machine on one device: NCCL says it late, HCCL may hang."""
        visible = visible_devices(self.type) or [str(self.device.index)]
        mine = (socket.gethostname(), visible[self.device.index if len(visible) > 1 else 0])
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, mine)
        together = [str(rank) for rank, place in enumerate(places) if place == mine]
        if len(together) > 1:
            dist.destroy_process_group()
            raise UserError(
                f"Ranks {', '.join(together)} would share {self.type} device {mine[1]} of {mine[0]}: "
                f"give each process its own ({VISIBLE[self.type]}, LOCAL_RANK), or start fewer."
            )

    @property
    def _sees_one(self) -> bool:
        """Whether a variable shows this process a single device, as schedulers do that give each its own."""
        visible = visible_devices(self.type)
        return visible is not None and len(visible) == 1

    @property
    def _module(self) -> Any:
        return getattr(torch, self.type)


def has_flash_attention(device: torch.device) -> bool:
    """Whether torch has its FlashAttention operations, which give the log-sum-exp, for a device."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def own_attention(device: torch.device) -> str | None:
    """Which attention kernels of its own a device has beside torch's: `fused` of an NPU, `cudnn` (from Hopper on, where they
    are the fastest that torch has), or None.
    """
    if device.type == "npu":
        return "fused"
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cudnn.is_available():
        return None
    return "cudnn" if torch.cuda.get_device_capability(device) >= (9, 0) else None


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _why_not(type_: str) -> str | None:
    """Why a device type cannot be used here; `None` if it can."""
    if type_ == "cpu":
        return None
    if type_ == "cuda":
        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    if not _torch_npu_installed() and not hasattr(torch, "npu"):
        return "torch_npu is not installed (pip install torch-npu, beside a matching CANN)"
    npu: ModuleType | None = getattr(torch, "npu", None)
    return None if npu is not None and npu.is_available() else "torch_npu finds no NPU"


def _import_torch_npu() -> None:
    """Import torch_npu where it is installed, unless torch itself did.

    Raises:
        UserError: it cannot be imported, as on a machine without CANN.
    """
    if hasattr(torch, "npu") or not _torch_npu_installed():
        return
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        # A missing CANN shows itself as any of the three, often as libhccl.so.
        raise UserError(broken_torch_npu(error)) from error


def _torch_npu_installed() -> bool:
    return importlib.util.find_spec("torch_npu") is not None
