"""Training checkpoints: tensors through torch's distributed checkpoint, everything else as JSON and
safetensors.

A checkpoint is written beside the others under a temporary name and renamed when it is complete, so a crash
at any moment leaves the older ones untouched and never a half-written one under a real name. All ranks write
into one folder, which they must share.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from mm_core.accelerator import Accelerator
from mm_core.random import keyed_seed
from mm_core.weights import layout
from mm_core.weights.agreement import rank, ranks_agree, world_size
from mm_core.weights.errors import WeightsError
from mm_core.weights.metadata import SafeReader, read_metadata
from mm_core.weights.optimizer_state import PREFIX, NamedOptimizer
from mm_core.weights.state_file import FORMAT, STATE, fault_of_state, read_state
from mm_core.weights.tensors import compare_keys, shortened, state_tensors
from mm_registry.errors import UserError

log = logging.getLogger(__name__)


def save_checkpoint(
    run: Path,
    iteration: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    *,
    with_rng: bool = True,
) -> Path:
    """Write `<run>/checkpoints/iter_<iteration>`; all ranks call this, and return when the checkpoint is
    complete and on disk.

    Args:
        run: the run's folder.
        iteration: optimizer steps done.
        modules: name -> module; tensors are stored as `<name>.<key>`, keys as in an unwrapped module's
            `state_dict()`.
        optimizer: over parameters of these modules; `None` leaves it out.
        state: `step`, `consumed_samples` and `seed`, and whatever else must come back, JSON-able.
        with_rng: store the states of each rank's generators.

    Raises:
        WeightsError: this iteration is already there, complete.
        CheckpointError: writing failed on some rank. Nothing that existed before was touched.
    """
    checkpoints = Path(run) / "checkpoints"
    final = checkpoints / layout.folder_name(iteration)
    temporary = checkpoints / f"{layout.TEMPORARY}{final.name}"
    what = f"writing {final}"
    with ranks_agree(what):
        if fault := fault_of_state(state):
            raise ValueError(fault)
        named = None if optimizer is None else NamedOptimizer(optimizer, modules)
        content = {
            "format": FORMAT,
            "iteration": iteration,
            "world_size": world_size(),
            "torch": torch.__version__,
            "modules": list(modules),
            "optimizer": None if named is None else named.settings(),
            "state": dict(state),
        }
        text = json.dumps(content, indent=1)
        tensors = _module_tensors(modules) | ({} if named is None else named.tensors())
        if rank() == 0:
            layout.prepare(checkpoints, iteration)
    with ranks_agree(what):
        dcp.save(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_writer=FileSystemWriter(temporary, sync_files=True),
        )
    with ranks_agree(what):
        if with_rng:
            _write_rng(temporary / _rng_name(rank()))
        if rank() == 0:
            layout.write_text(temporary / STATE, text)
        # Each rank reads what it wrote, all at once; rank 0 alone would take as long as all of them together.
        own = {file.name: layout.checksum(file) for file in sorted(temporary.glob(f"__{rank()}_*.distcp"))}
    checksums = _gathered(own)
    with ranks_agree(what):
        if rank() == 0:
            layout.write_marker(temporary, iteration, checksums)
            layout.publish(temporary, final)
    return final


def load_checkpoint(
    checkpoint: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    with_rng: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint into modules and optimizer, in place; all ranks call this. Any number of ranks can
    read what any number wrote.

    Args:
        checkpoint: one complete `iter_…` folder, as `resolve_load` returns it.
        modules: as they were saved; materialised, on any mesh. Fewer than were saved is fine.
        optimizer: `None` leaves the stored one alone.
        with_rng: put back the states of the generators. A rank that did not exist then gets freshly keyed
            ones, and a line in the log.

    Returns:
        The `state` that was saved.

    Raises:
        WeightsError: damaged or unsafe files, or tensors that do not fit; missing, unexpected and wrongly
            shaped ones are listed.
        CheckpointError: reading failed on some rank.
    """
    checkpoint = Path(checkpoint)
    what = f"reading {checkpoint}"
    with ranks_agree(what):
        layout.verify_contents(checkpoint, rank(), world_size())
    with ranks_agree(what):
        content = read_state(checkpoint)
        stored = _stored_shapes(checkpoint)
        tensors = _module_tensors(modules)
        _check_modules(tensors, stored, modules, checkpoint)
        named = None
        if optimizer is not None:
            if content["optimizer"] is None:
                raise WeightsError(
                    f"{checkpoint} was saved without its optimizer (--no-save-optim); "
                    "resume with --no-load-optim."
                )
            named = NamedOptimizer(optimizer, modules)
            tensors |= named.prepare_states({name for name in stored if name.startswith(PREFIX)})
            for change in named.restore_settings(content["optimizer"]):
                log.warning("the optimizer goes on with another setting than the checkpoint's: %s", change)
    with ranks_agree(what):
        _read_tensors(tensors, checkpoint)
    with ranks_agree(what):
        if with_rng:
            _read_rng(checkpoint, content)
    state: dict[str, Any] = content["state"]
    return state


def load_module_weights(module: nn.Module, checkpoint: Path, prefix: str = "predictor") -> None:
    """Read one module of a training checkpoint, in place, in one process and without sharding; dtypes are
    converted.

    Args:
        module: materialised and unsharded.
        checkpoint: one complete `iter_…` folder, as `resolve_load` returns it.
        prefix: the name that it was saved under.

    Raises:
        WeightsError: as `load_checkpoint`.
    """
    checkpoint = Path(checkpoint)
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise RuntimeError("the module is sharded; use load_checkpoint on all ranks")
    with ranks_agree(f"reading {checkpoint}", alone=True):
        layout.verify_contents(checkpoint)
        tensors = _module_tensors({prefix: module})
        _check_modules(tensors, _stored_shapes(checkpoint), {prefix: module}, checkpoint)
        with warnings.catch_warnings():
            # It tells that there is no process group, which is what is meant here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            _read_tensors(tensors, checkpoint, no_dist=True)


def _read_tensors(tensors: Mapping[str, torch.Tensor], checkpoint: Path, *, no_dist: bool = False) -> None:
    """Fill tensors from the checkpoint.

    Raises:
        WeightsError: the files hold no such tensors.
        CheckpointException: they cannot be read: of torch, with the errors of all ranks.
    """
    try:
        dcp.load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=SafeReader(checkpoint),
            no_dist=no_dist,
        )
    except CheckpointException as error:
        reasons = [failure for failure, _ in error.failures.values()]
        # Of the disk and of memory; everything else that reading can raise comes from what the files hold.
        if any(isinstance(reason, OSError | MemoryError | torch.OutOfMemoryError) for reason in reasons):
            raise
        said = next((str(r) for r in reasons if isinstance(r, UserError)), None)
        if said is None:
            text = " ".join(f"{type(reasons[0]).__name__}: {reasons[0]}".split())
            said = f"{checkpoint} is damaged: its tensors cannot be read ({text[:300]}).{layout.older(checkpoint)}"
        raise WeightsError(said) from error


def _gathered(mine: Mapping[str, str]) -> dict[str, str]:
    """The entries of all ranks."""
    everyones: list[Any] = [mine]
    if world_size() > 1:
        everyones = [None] * world_size()
        dist.all_gather_object(everyones, mine)
    return {name: value for entries in everyones for name, value in entries.items()}


def _module_tensors(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """All tensors to store or fill, a tied one under its first name only."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, module in modules.items():
        for name, tensor in state_tensors(module).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[f"{prefix}.{name}"] = tensor
    return tensors


def _stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry.size) for name, entry in read_metadata(checkpoint).state_dict_metadata.items()}


def _check_modules(
    tensors: Mapping[str, torch.Tensor],
    stored: Mapping[str, tuple[int, ...]],
    modules: Mapping[str, nn.Module],
    checkpoint: Path,
) -> None:
    prefixes = tuple(f"{name}." for name in modules)
    offered = {name for name in stored if name.startswith(prefixes)}
    if not offered:
        names = sorted({name.split(".")[0] for name in stored} - {PREFIX.rstrip(".")})
        raise WeightsError(f"{checkpoint} has no {', '.join(modules)}, only {', '.join(names)}.")
    missing, unexpected = compare_keys(tensors, offered)
    wrong = [
        f"  shape: {name} is {list(stored[name])} in the checkpoint, {list(tensors[name].shape)} in the model"
        for name in sorted(offered & tensors.keys())
        if stored[name] != tuple(tensors[name].shape)
    ]
    if missing or unexpected or wrong:
        raise WeightsError(
            f"{checkpoint} does not fit the model:\n"
            + "\n".join([*missing, *unexpected, *shortened(wrong, 20)])
        )


def _rng_name(of_rank: int) -> str:
    return f"rng-{of_rank:05d}.safetensors"


def _write_rng(path: Path) -> None:
    data = safetensors.torch.save(Accelerator.current().rng_state())
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _read_rng(checkpoint: Path, content: Mapping[str, Any]) -> None:
    accelerator = Accelerator.current()
    file = checkpoint / _rng_name(rank())
    if file.is_file():
        try:
            accelerator.set_rng_state(safetensors.torch.load_file(file))
        except (
            SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError
        ) as error:  # fmt: skip
            raise WeightsError(f"{file} cannot be used ({error}); resume with --no-load-rng.") from error
        return
    seed: int = content["state"]["seed"]
    accelerator.seed_all(keyed_seed(seed, "resumed generators", content["iteration"], rank()))
    log.warning(
        "%s has no generator states for rank %d (it was written by %d ranks); "
        "fresh ones are keyed by seed, iteration and rank.",
        checkpoint, rank(), content["world_size"],
    )  # fmt: skip
