"""How a checkpoint is written: what each rank writes is planned and, if training is to go on, copied; the rest needs
neither the training's threads nor its process groups.

torch's distributed checkpoint plans, and makes the files; the exchange between ranks is our own: see `agreement`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from mm_core.accelerator import Accelerator
from mm_core.weights import layout
from mm_core.weights.agreement import at_rank_0, everywhere, from_rank_0, rank, ranks_agree, world_size
from mm_core.weights.optimizer_state import NamedOptimizer, merged_settings
from mm_core.weights.peft_names import kept_tensors
from mm_core.weights.retention import Retention
from mm_core.weights.snapshot import HostBuffers
from mm_core.weights.space import check_space
from mm_core.weights.state_file import FORMAT, STATE, fault_of_state

log = logging.getLogger(__name__)

_HEADER = 2048  # bytes around a tensor in torch's format, at most


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of.

    Args:
        modules: name -> module; tensors are stored as `<name>.<key>`, keys as in an unwrapped module's
            `state_dict()`.
        optimizer: over parameters of these modules; `None` leaves it out.
        state: `step`, `consumed_samples` and `seed`, and whatever else must come back, JSON-able.
        with_rng: store the states of each rank's generators.
        stages: pipeline stages that the modules are parts of.
        stage: which of them this rank tells the optimizer's settings of; one rank of each stage does.
    """

    modules: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer | None
    state: Mapping[str, Any]
    with_rng: bool = True
    stages: int = 1
    stage: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is ready to be written, by any thread.

    Attributes:
        final: where it will be.
    """

    iteration: int
    final: Path
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    texts: Mapping[str, bytes] = field(repr=False)
    copied: Any  # the event of the snapshot

    @property
    def temporary(self) -> Path:
        return self.final.with_name(f"{layout.TEMPORARY}{self.final.name}")


class CheckpointWriter:
    """Writes the checkpoints of a run; what is the same in each is found out once.

    Args:
        run: the run's folder.
        group: of all ranks, with a gloo side, for `write`; by default the default group. A thread beside the training
            needs one of its own.
        retention: which older ones stay.
    """

    def __init__(
        self, run: Path, *, group: dist.ProcessGroup | None = None, retention: Retention | None = None
    ) -> None:
        self.checkpoints = Path(run) / "checkpoints"
        self._group = group
        self._retention = retention or Retention()
        self._cancelled = threading.Event()
        self._accelerator = Accelerator.current()
        self._buffers = HostBuffers(self._accelerator)
        self._signature: object = None
        self._planner = _Planner()
        self._plan: SavePlan = SavePlan([])
        self._metadata: Metadata | None = None  # on rank 0
        self._bytes = 0  # of all ranks; on rank 0

    def prepare(self, iteration: int, contents: Contents, *, snapshot: bool) -> Prepared:
        """Find out what to write, and make the folder for it; all ranks call this, in the training's thread.

        Args:
            iteration: optimizer steps done.
            snapshot: copy everything, so that training can go on while it is written. The copies are overwritten by
                the next call: `write` must be done by then.

        Raises:
            WeightsError: this iteration is already there, complete; or there is no room on the disk.
            CheckpointError: some rank failed. Nothing was written.
        """
        final = self.checkpoints / layout.folder_name(iteration)
        what = f"writing {final}"
        with ranks_agree(what, group=self._group):
            if fault := fault_of_state(contents.state):
                raise ValueError(fault)
            named = (
                None if contents.optimizer is None else NamedOptimizer(contents.optimizer, contents.modules)
            )
            settings = None if named is None else named.settings()
        if contents.stages > 1:
            told = everywhere((contents.stage, settings) if contents.stage is not None else None, self._group)
            parts = dict(one for one in told if one is not None)
            if settings is not None:
                settings = merged_settings([parts[stage] for stage in range(contents.stages)])
        with ranks_agree(what, group=self._group):
            tensors, texts = _take(iteration, contents, named, settings, self._accelerator)
            signature = [(name, _kind(tensor)) for name, tensor in tensors.items()]
        if not all(everywhere(signature == self._signature, self._group)):
            self._signature = None
            self._make_plan(tensors, what)
            self._signature = signature
        with ranks_agree(what, group=self._group):
            if rank() == 0:
                texts_of_ranks = len(texts.get(rng_name(0), b"")) * world_size() + len(texts[STATE])
                check_space(self.checkpoints, self._bytes + texts_of_ranks)
                layout.prepare(self.checkpoints, iteration)
            mine = {item.index.fqn: _local(tensors[item.index.fqn]) for item in self._plan.items}
            copies, event = self._buffers.copy(mine) if snapshot else (mine, None)
        return Prepared(iteration, final, copies, texts, event)

    def cancel(self) -> None:
        """Let a `write` in another thread fail as soon as it can; the process is about to end."""
        self._cancelled.set()

    def use_device(self) -> None:
        """Make this rank's device that of the calling thread, which `write` in another one needs: a new thread's is the
        first one.
        """
        self._accelerator.use()

    def write(self, prepared: Prepared) -> Path:
        """Write what was prepared and return where it is, complete and on disk; all ranks call this.

        Raises:
            CheckpointError: writing failed on some rank. Nothing that existed before was touched.
        """
        temporary, what = prepared.temporary, f"writing {prepared.final}"
        try:
            written = self._write_files(prepared, what)
            checksums = at_rank_0(written, self._group)
            with ranks_agree(what, group=self._group):
                if checksums is not None:
                    known = {name: value for of_rank in checksums for name, value in of_rank.items()}
                    layout.write_marker(temporary, prepared.iteration, known)
                    layout.publish(temporary, prepared.final)
        except BaseException:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # its room may be what is missing
            raise
        if rank() == 0:
            for name in self._retention.apply(self.checkpoints, prepared.final):
                log.info("removed checkpoint %s", name)
        return prepared.final

    def _make_plan(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """Agree on who writes which tensor."""
        self._planner = planner = _Planner()
        with ranks_agree(what, group=self._group):
            # Plain tensors are alike on all ranks; each plans its own, and the copies are dropped below.
            planner.set_up_planner(
                {name: tensor.detach() for name, tensor in tensors.items()}, is_coordinator=True
            )
            local = planner.create_local_plan()
        locals_ = at_rank_0(local, self._group)
        plans = None
        with ranks_agree(what, group=self._group):
            if locals_ is not None:
                plans, self._metadata = planner.create_global_plan(locals_)
                plans = FileSystemWriter(self.checkpoints).prepare_global_plan(plans)
                items = [item.tensor_data for plan in plans for item in plan.items]
                self._bytes = sum(
                    _HEADER + data.chunk.sizes.numel() * data.properties.dtype.itemsize
                    for data in items
                    if data
                )
        self._plan = planner.finish_plan(from_rank_0(plans, self._group))

    def _write_files(self, prepared: Prepared, what: str) -> dict[str, str]:
        """Write the files of this rank, and read them again; return their checksums."""
        files = _Files(self._cancelled)
        writer = FileSystemWriter(prepared.temporary, sync_files=True, per_thread_copy_ahead=0)
        writer.fs = files
        with ranks_agree(what, group=self._group):
            if prepared.copied is not None:
                prepared.copied.synchronize()
            self._planner.held = prepared.tensors
            writer.set_up_storage_writer(rank() == 0, rank=rank(), use_collectives=True)
            mine = writer.write_data(self._plan, self._planner).wait()
            self._planner.held = {}
        results = at_rank_0(mine, self._group)
        with ranks_agree(what, group=self._group):
            if results is not None:
                assert self._metadata is not None
                writer.finish(dataclasses.replace(self._metadata), results)
                files.digests[".metadata"] = files.digests.pop(".metadata.tmp")
            for name, data in prepared.texts.items():
                files.write(prepared.temporary / name, data)
            for name, written in files.digests.items():
                if layout.checksum(prepared.temporary / name, from_disk=True) != written:
                    raise OSError(
                        f"{prepared.temporary / name} does not read as it was written: the disk is faulty"
                    )
        return files.digests


class _Planner(DefaultSavePlanner):
    """torch's planner, which finds the data of this rank in `held`."""

    held: Mapping[str, torch.Tensor] = {}

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.held[index.fqn]


class _Files(FileSystem):
    """Files whose checksums are made of what is written, before a disk can change it."""

    def __init__(self, cancelled: threading.Event) -> None:
        super().__init__()
        self.digests: dict[str, str] = {}
        self._cancelled = cancelled

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            digested = _Digested(stream, self._cancelled)
            yield digested
        self.digests[Path(path).name] = digested.digest.hexdigest()

    def write(self, path: Path, data: bytes) -> None:
        """Write a small file and wait until it is on disk."""
        with self.create_stream(path, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


class _Digested:
    """A stream being written, and the digest of it."""

    def __init__(self, stream: Any, cancelled: threading.Event) -> None:
        self._stream, self._cancelled = stream, cancelled
        self.digest = layout.new_digest()
        self.tell, self.flush = stream.tell, stream.flush
        self.fileno, self.close = stream.fileno, stream.close

    def write(self, data: Any) -> int:
        if self._cancelled.is_set():
            raise InterruptedError("the run was interrupted")
        self.digest.update(data)
        written: int = self._stream.write(data)
        return written


def module_tensors(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """All tensors to store or fill, a tied one under its first name only; of a network with PEFT adapters what is
    trained.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, module in modules.items():
        for name, tensor in kept_tensors(module).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[f"{prefix}.{name}"] = tensor
    return tensors


def _take(
    iteration: int,
    contents: Contents,
    named: NamedOptimizer | None,
    settings: Mapping[str, Any] | None,
    accelerator: Accelerator,
) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """The tensors, and the small files of this rank: name -> bytes.

    Args:
        named: the optimizer.
        settings: of the optimizer of all stages.
    """
    modules = contents.modules
    texts: dict[str, bytes] = {}
    if rank() == 0:
        content = {
            "format": FORMAT,
            "iteration": iteration,
            "world_size": world_size(),
            "torch": torch.__version__,
            "modules": list(modules),
            "optimizer": settings,
            "state": dict(contents.state),
        }
        texts[STATE] = json.dumps(content, indent=1).encode()
    if contents.with_rng:
        texts[rng_name(rank())] = safetensors.torch.save(accelerator.rng_state())
    return module_tensors(modules) | ({} if named is None else named.tensors()), texts


def _kind(tensor: torch.Tensor) -> object:
    """What a plan depends on."""
    if isinstance(tensor, DTensor):
        return tensor.shape, tensor.dtype, tensor.placements, tensor.device_mesh
    return tensor.shape, tensor.dtype


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def rng_name(of_rank: int) -> str:
    """The file of a rank's generators."""
    return f"rng-{of_rank:05d}.safetensors"
