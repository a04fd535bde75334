"""Training checkpoints: tensors through torch's distributed checkpoint, everything else as JSON and
safetensors.

A checkpoint is written beside the others under a temporary name and renamed when it is complete, so a crash
at any moment leaves the older ones untouched and never a half-written one under a real name. All ranks write
into one folder, which they must share.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from mm_core.accelerator import Accelerator
from mm_core.random import keyed_seed
from mm_core.weights import layout
from mm_core.weights.agreement import rank, ranks_agree, world_size
from mm_core.weights.errors import WeightsError
from mm_core.weights.metadata import SafeReader, read_metadata
from mm_core.weights.optimizer_state import PREFIX, NamedOptimizer
from mm_core.weights.peft_names import base_tensors
from mm_core.weights.state_file import EMA, read_state
from mm_core.weights.tensors import compare_keys, shortened
from mm_core.weights.writing import CheckpointWriter, Contents, module_tensors, rng_name
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
    writer = CheckpointWriter(run)
    contents = Contents(modules, optimizer, state, with_rng)
    return writer.write(writer.prepare(iteration, contents, snapshot=False))


def load_checkpoint(
    checkpoint: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    with_rng: bool = True,
    elsewhere: Collection[str] = (),
    generators_of: int | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into modules and optimizer, in place; all ranks call this. Any number of ranks can
    read what any number wrote.

    Args:
        checkpoint: one complete `iter_…` folder, as `resolve_load` returns it.
        modules: as they were saved; materialised, on any mesh. Fewer than were saved is fine.
        optimizer: `None` leaves the stored one alone.
        with_rng: put back the states of the generators. A rank that did not exist then gets freshly keyed
            ones, and a line in the log.
        elsewhere: stored names of tensors that other pipeline stages have (`predictor.blocks.0.…`).
        generators_of: the rank whose generators this one goes on with; by default its own.

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
        tensors = module_tensors(modules)
        _check_modules(tensors, stored, modules, checkpoint, elsewhere)
        named = None
        if optimizer is not None:
            if content["optimizer"] is None:
                raise WeightsError(
                    f"{checkpoint} was saved without its optimizer (--no-save-optim); "
                    "resume with --no-load-optim."
                )
            named = NamedOptimizer(optimizer, modules)
            tensors |= named.prepare_states({name for name in stored if name.startswith(PREFIX)}, elsewhere)
            for change in named.restore_settings(content["optimizer"], elsewhere):
                log.warning("the optimizer goes on with another setting than the checkpoint's: %s", change)
    with ranks_agree(what):
        _read_tensors(tensors, checkpoint)
    with ranks_agree(what):
        if with_rng:
            _read_rng(checkpoint, content, rank() if generators_of is None else generators_of)
    state: dict[str, Any] = content["state"]
    return state


def load_module_weights(
    module: nn.Module, checkpoint: Path, prefix: str = "predictor", *, ema: bool = False
) -> None:
    """Read one module of a training checkpoint, in place, in one process and without sharding; dtypes are
    converted.

    Args:
        module: materialised and unsharded.
        checkpoint: one complete `iter_…` folder, as `resolve_load` returns it.
        prefix: the name that it was saved under.
        ema: take the averages of the weights that were trained (`--ema-decay`), and the rest as it was.

    Raises:
        WeightsError: as `load_checkpoint`, or there are no averages.
    """
    checkpoint = Path(checkpoint)
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise RuntimeError("the module is sharded; use load_checkpoint on all ranks")
    with ranks_agree(f"reading {checkpoint}", alone=True):
        layout.verify_contents(checkpoint)
        tensors, stored = module_tensors({prefix: module}), _stored_shapes(checkpoint)
        _check_modules(tensors, stored, {prefix: module}, checkpoint)
        if ema:
            averaged = {f"{EMA}{name}" for name in tensors} & stored.keys()
            if not averaged:
                raise WeightsError(f"{checkpoint} has no averaged weights; it was saved without --ema-decay.")
            tensors = {f"{EMA}{n}" if f"{EMA}{n}" in averaged else n: t for n, t in tensors.items()}
        _read_tensors(tensors, checkpoint)


def load_base_weights(module: nn.Module, checkpoint: Path, prefix: str) -> None:
    """Read the weights under a module's PEFT adapters from a checkpoint of a run without any, in place; dtypes are
    converted. All ranks call this.

    Args:
        module: materialised, sharded or not.
        checkpoint: one complete `iter_…` folder, as `resolve_load` returns it.
        prefix: the name that it was saved under.

    Raises:
        WeightsError, CheckpointError: as `load_checkpoint`.
    """
    what = f"reading {checkpoint}"
    with ranks_agree(what):
        layout.verify_contents(checkpoint, rank(), world_size())
    with ranks_agree(what):
        once = {id(tensor): (name, tensor) for name, tensor in reversed(base_tensors(module).items())}
        tensors = {f"{prefix}.{name}": tensor for name, tensor in once.values()}
        _check_modules(tensors, _stored_shapes(checkpoint), {prefix: module}, checkpoint)
        _read_tensors(tensors, checkpoint)


def _read_tensors(tensors: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    """Fill this rank's part of tensors from the checkpoint.

    Raises:
        WeightsError: the files hold no such tensors.
        OSError, MemoryError, torch.OutOfMemoryError: they cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # Each rank reads for itself. torch tells that it asks no other one, which is what is meant here: it would
            # send long messages, see `agreement`, only to find that everybody reads what it planned.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_reader=SafeReader(checkpoint),
                no_dist=True,
            )
    except CheckpointException as error:
        reasons = [failure for failure, _ in error.failures.values()]
        # Of the disk and of memory; everything else that reading can raise comes from what the files hold.
        for reason in reasons:
            if isinstance(reason, OSError | MemoryError | torch.OutOfMemoryError):
                raise reason from error
        said = next((str(r) for r in reasons if isinstance(r, UserError)), None)
        if said is None:
            text = " ".join(f"{type(reasons[0]).__name__}: {reasons[0]}".split())
            said = f"{checkpoint} is damaged: its tensors cannot be read ({text[:300]}).{layout.older(checkpoint)}"
        raise WeightsError(said) from error


def _stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry.size) for name, entry in read_metadata(checkpoint).state_dict_metadata.items()}


def _check_modules(
    tensors: Mapping[str, torch.Tensor],
    stored: Mapping[str, tuple[int, ...]],
    modules: Mapping[str, nn.Module],
    checkpoint: Path,
    elsewhere: Collection[str] = (),
) -> None:
    prefixes = tuple(f"{name}." for name in modules)
    offered = {name for name in stored if name.startswith(prefixes)}.difference(elsewhere)
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


def _read_rng(checkpoint: Path, content: Mapping[str, Any], of_rank: int) -> None:
    accelerator = Accelerator.current()
    file = checkpoint / rng_name(of_rank)
    if file.is_file():
        try:
            accelerator.set_rng_state(safetensors.torch.load_file(file))
        except (
            SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError
        ) as error:  # fmt: skip
            raise WeightsError(f"{file} cannot be used ({error}); resume with --no-load-rng.") from error
        return
    seed: int = content["state"]["seed"]
    accelerator.seed_all(keyed_seed(seed, "resumed generators", content["iteration"], of_rank))
    why = (
        "it was saved without them (--no-save-rng)"
        if of_rank < content["world_size"]
        else f"it was written by {content['world_size']} ranks"
    )
    log.warning(
        "%s has no generator states for rank %d (%s); fresh ones are keyed by seed, iteration and rank.",
        checkpoint, of_rank, why,
    )  # fmt: skip
