"""Continuing from a checkpoint: which one `--load` means, whether the job is still the same, and what is read from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_core.config import TrainFlags, TrainingJob
from mm_core.config.document import expanded
from mm_core.data.streams import is_streamed
from mm_core.sharding.pipeline import tensors_elsewhere
from mm_core.training.changes import changes, other_versions
from mm_core.training.ema import ExponentialAverage
from mm_core.weights import is_hf_folder, load_checkpoint, resolve_load
from mm_core.weights.agreement import everywhere, rank, ranks_agree, world_size
from mm_core.weights.state_file import EMA, read_state
from mm_core.weights.stored import StoredWeights
from mm_registry.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resume:
    """A checkpoint that a run goes on from, or takes its weights from.

    Attributes:
        checkpoint: its folder.
        fresh: only the weights are taken (`--finetune`); the run starts at step 0.
        state: what it says of its run.
        modules: names of what it holds tensors of.
        told: what is different now, for the log.
        position: of this rank's stream of data; `None` if the number of consumed samples says it all.
    """

    checkpoint: Path
    fresh: bool
    state: Mapping[str, Any]
    modules: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    position: Any = field(default=None, repr=False)

    @property
    def step(self) -> int:
        return 0 if self.fresh else int(self.state["step"])

    @property
    def consumed_samples(self) -> int:
        return 0 if self.fresh else int(self.state["consumed_samples"])

    @property
    def stored(self) -> dict[str, StoredWeights]:
        """Component -> how its weights lay in the folder that they came from once."""
        weights = self.state.get("weights", {})
        return {name: StoredWeights.from_json(value) for name, value in weights.items()}

    def restore(
        self,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        ema: ExponentialAverage | None,
        flags: TrainFlags,
    ) -> None:
        """Read weights, and for a run that goes on optimizer, averages and generators, in place; all ranks call this.

        Raises:
            WeightsError, CheckpointError: as `load_checkpoint`.
        """
        averages = {} if ema is None or self.fresh else ema.modules()
        averages = {name: module for name, module in averages.items() if name in self.modules}
        # Checkpoints hold all pipeline stages, whatever this rank has of them.
        names = [(name, other) for name, module in modules.items() for other in tensors_elsewhere(module)]
        tensor = flags.tensor_model_parallel_size
        load_checkpoint(
            self.checkpoint,
            {**modules, **averages},
            None if self.fresh or flags.no_load_optim else optimizer,
            with_rng=not (self.fresh or flags.no_load_rng),
            elsewhere={f"{prefix}{name}.{other}" for prefix in ("", EMA) for name, other in names},
            # Ranks that share tensors draw alike, also where the checkpoint's did not; they follow each other.
            generators_of=rank() // tensor * tensor,
        )
        if ema is not None and not averages:
            ema.restart()
            log.info("the averaged weights (--ema-decay) start as the weights of %s", self.checkpoint)
        if self.fresh:
            log.info("predictor: weights of %s; the run starts at step 0 (--finetune)", self.checkpoint)
            return
        for line in self.told:
            log.warning("%s", line)
        log.info("continuing %s after step %d", self.checkpoint, self.step)
        if self.step >= flags.train_iters:
            log.warning(
                "nothing is left to train: --train-iters is %d, and the checkpoint is of step %d",
                flags.train_iters,
                self.step,
            )


def find_resume(job: TrainingJob, dataset: Any) -> Resume | None:
    """The checkpoint that `--load` names; `None` without `--load`, and if it names a Hugging Face folder. Nothing but its
    state.json is read.

    Raises:
        UserError: there is none, it is damaged, or the job is not the one that wrote it, and neither --accept-changes nor
            --finetune is given.
    """
    flags = job.flags
    if flags.load is None or is_hf_folder(expanded(flags.load)):
        return None
    # Another run may save into that folder meanwhile, and not every rank need see the same newest one.
    with ranks_agree(f"reading --load {flags.load}"):
        checkpoint = resolve_load(expanded(flags.load))
    first = everywhere(checkpoint.name)[0]
    checkpoint = checkpoint if checkpoint.name == first else checkpoint.with_name(first)
    content = read_state(checkpoint)
    state, modules = content["state"], content.get("modules")
    _check_adapters(state, job, checkpoint)
    names = tuple(map(str, modules)) if isinstance(modules, list) else ()
    if flags.finetune:
        return Resume(checkpoint, True, state, names)
    if state["seed"] != flags.seed:
        raise UserError(
            f"--seed {flags.seed}: the run that --load continues has seed {state['seed']}, and order, noise and timesteps "
            f"would change in its middle; use --seed {state['seed']}, or --finetune to start another run from its weights."
        )
    different = changes(state, job)
    if different and not flags.accept_changes:
        lines = "\n".join(f"  {line}" for line in different)
        raise UserError(
            f"--load {flags.load}: the job is not the one that saved {checkpoint.name}:\n{lines}\n"
            "Change it back, or add --accept-changes to go on with what is written now (--finetune starts another run from "
            "the weights)."
        )
    told = [f"changed since the checkpoint was written: {line}" for line in different]
    if versions := other_versions(state):
        told.append(f"packages are not those of the checkpoint: {', '.join(versions)}")
    position = None
    if is_streamed(dataset):
        position, lines_of_data = _position(state, job)
        told += lines_of_data
    elif state.get("dataset_samples", len(dataset)) != len(dataset):
        told.append(
            f"the dataset has {len(dataset)} samples, and had {state['dataset_samples']} when the checkpoint was written: "
            "the order of samples changes from here"
        )
    return Resume(checkpoint, False, state, names, tuple(told), position)


def _check_adapters(state: Mapping[str, Any], job: TrainingJob, checkpoint: Path) -> None:
    """A run with LoRA goes on from a run with LoRA.

    Raises:
        UserError: one has adapters and the other has none.
    """
    load = f"--load {job.flags.load}"
    if job.lora is None and "lora" in state:
        targets = state["lora"].get("target_modules") or ["…"]
        raise UserError(
            f"{load}: {checkpoint.name} has an adapter alone, and the job trains without LoRA; give the flags that it was "
            f"trained with (--lora-target-modules {' '.join(targets)} …), or make a whole folder of it with `mm convert "
            "--merge-lora`."
        )
    if job.lora is not None and "lora" not in state:
        raise UserError(
            f"{load}: {checkpoint.name} was trained without LoRA and has no adapter; if its weights are to be under one, "
            f"give it as --load-base-model {job.flags.load}."
        )


def _position(state: Mapping[str, Any], job: TrainingJob) -> tuple[Any, list[str]]:
    """Where this rank's stream of an iterable dataset was, and what to say about it."""
    loader, flags = state.get("loader"), job.flags
    reason = _why_not_there(loader, flags, job.parallel.data_parallel(world_size()))
    if reason is None:
        assert loader is not None
        return loader["ranks"][job.parallel.place(rank(), world_size()).dp], []
    if not flags.accept_changes:
        raise UserError(
            f"--load {flags.load}: an iterable dataset goes on only where it was left, and {reason}; resume as it was, "
            "or add --accept-changes to read the data from its beginning."
        )
    return None, [f"the data starts from its beginning: {reason}"]


def _why_not_there(loader: Mapping[str, Any] | None, flags: TrainFlags, readers: int) -> str | None:
    if loader is None:
        return "the checkpoint has no position of it"
    ranks = len(loader["ranks"])
    if ranks != readers:
        return f"{ranks} ranks read it before, and {readers} would now"
    for name in ("num_workers", "micro_batch_size"):
        if loader[name] != getattr(flags, name):
            return f"{flags.spelling(name)} was {loader[name]}, and is {getattr(flags, name)} now"
    return None


def loader_state(loader: Any, job: TrainingJob) -> dict[str, Any]:
    """`{"loader": …}` with the position of each data-parallel rank in its stream; all ranks call this. Empty for a
    map-style dataset.

    Raises:
        UserError: on every rank, if the dataset's state cannot be stored.
    """
    with ranks_agree("saving the position of the data"):
        mine = loader.state_dict()
    if mine is None:
        return {}
    flags, everyones = job.flags, everywhere(mine)
    places = [job.parallel.place(r, len(everyones)) for r in range(len(everyones))]
    everyones = [
        one for one, place in zip(everyones, places, strict=True) if not (place.pp or place.cp or place.tp)
    ]
    sizes = {"num_workers": flags.num_workers, "micro_batch_size": flags.micro_batch_size}
    return {"loader": {**sizes, "ranks": everyones}}
