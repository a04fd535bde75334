"""The loss of a validation set while a model is trained (`--eval-interval`, `--eval-iters`).

A run with validation trains as one without: generators, modes and gradients are afterwards as they were before.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

import mm_core
from mm_core.accelerator import Accelerator
from mm_core.config import TrainingJob
from mm_core.data.collate import Batch
from mm_core.data.errors import DataError
from mm_core.data.validation import ValidationBatches
from mm_core.observe.console import human_count
from mm_core.random import keyed_seed
from mm_core.sharding.mesh import ParallelMesh
from mm_core.training.step import Passes, sharded_roots
from mm_core.training.tasks.base import LossParts, Task
from mm_core.weights.agreement import everywhere

if TYPE_CHECKING:
    from mm_core.training.pipeline import PipelineStep

log = logging.getLogger(__name__)
INTERVAL = 1000
"""Steps between validations without --eval-interval: Megatron-LM's default."""
_ASKED = 8  # batches after which the ranks agree on whether to stop
ForwardPass = Callable[[Any], LossParts | None]
"""Takes what `Task.prepare` made of a micro batch; None on a rank that has no losses."""


class Validation:
    """Computes the loss of a validation set, exactly: every sample counts once, however many ranks there are.

    Sums and weights are those of the task, as in training; they are added up in float64, over samples, then over ranks.
    What a task draws is keyed by the sample, with a seed of its own, so that each validation sees the same noise.

    Args:
        model: as the task is given it.
        task: of the validation, with its own seed.
        batches: of this rank.
        mesh: of the model.
        accelerator: whose generators are kept.
        interval: steps from one validation to the next.
        last_step: after which there is one in any case.
        forward: forward pass of a micro batch; by default the task's own.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        batches: ValidationBatches,
        *,
        mesh: ParallelMesh,
        accelerator: Accelerator,
        interval: int,
        last_step: int,
        forward: ForwardPass | None = None,
    ) -> None:
        self.model, self.task, self.batches = model, task, batches
        self.mesh, self.accelerator = mesh, accelerator
        self.interval, self.last_step = interval, last_step
        self.forward = forward or self._forward
        self._given_up = False

    def due(self, step: int) -> bool:
        """Whether there is one after this step."""
        return step % self.interval == 0 or step == self.last_step

    def run(self, step: int, stop_requested: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Validate; all ranks call this.

        Args:
            step: after which, for the log.
            stop_requested: true after SIGTERM. As soon as one rank says so, validation is given up.

        Returns:
            `val_loss`, `val_` and the name of each metric of the task, all means over the set, weighted as the task says,
            `val_samples`, `val_seconds`. Empty if validation was given up.

        Raises:
            DataError: what the data say.
        """
        started = time.perf_counter()
        sums = ValidationSums()
        with torch.no_grad(), left_as_it_was(self.model, self.accelerator):
            for batch, samples in self._together(stop_requested):
                for number, inputs in enumerate(self._inputs(batch)):
                    sums.add(self.forward(inputs), samples, again=number > 0)
            total = sums.reduce()
        if self._given_up:
            log.info("validation after step %d is given up: the run was asked to stop", step)
            return {}
        count = total.samples // (dist.get_world_size() // self.mesh.dp_size)
        seconds = time.perf_counter() - started
        means = total.means()
        if not math.isfinite(means["val_loss"]):
            log.warning(
                "validation after step %d: the loss is %s, over weights that add up to %g; training goes on",
                step, means["val_loss"], total.weight,
            )  # fmt: skip
        told = ", ".join(f"{name.removeprefix('val_')} {value:.4f}" for name, value in means.items())
        log.info("validation after step %d: %s; %d samples in %.1f s", step, told, count, seconds)
        return {**means, "val_samples": count, "val_seconds": seconds}

    def _inputs(self, batch: Batch) -> Iterator[Any]:
        """What the model is run with for one batch: once, or as often as the task says."""
        several = getattr(self.task, "validation_inputs", None)
        return several(batch) if several is not None else iter(self.task.prepare([batch]))

    def _forward(self, inputs: Any) -> LossParts:
        return self.task.loss(self.task.forward(self.model, inputs), inputs)

    def _together(self, stop_requested: Callable[[], bool]) -> Iterator[tuple[Batch, int]]:
        """The batches of this rank, as many as each other rank's."""
        self._given_up = False
        if self.batches.streamed:
            yield from self._of_streams(stop_requested)
            return
        for number, (batch, samples) in enumerate(self.batches):
            if number % _ASKED == 0 and any(everywhere(stop_requested())):
                self._given_up = True
                return
            yield batch, samples

    def _of_streams(self, stop_requested: Callable[[], bool]) -> Iterator[tuple[Batch, int]]:
        """As long as any rank has something; one that has no more repeats its last batch, which does not count.

        Raises:
            DataError: a rank has nothing at all to begin with, on every rank.
        """
        batches, last = iter(self.batches), None
        while True:
            batch, samples = next(batches, (last, 0))
            told = everywhere((samples, batch is None, stop_requested()))
            self._given_up = any(stop for *_, stop in told)
            if self._given_up or not any(samples for samples, *_ in told):
                return
            if empty := sum(nothing for _, nothing, _ in told):
                raise DataError(
                    f"the validation set is a stream, of which {empty} of {len(told)} ranks got no sample; give it more "
                    "samples, or do not stream it"
                )
            assert batch is not None
            last = batch
            yield batch, samples


class ValidationSums:
    """Adds up what micro batches return, without waiting for the device, and reduces it over all ranks in float64."""

    def __init__(self) -> None:
        self.samples = 0
        self._losses: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._metrics: dict[str, list[torch.Tensor]] = {}

    def add(self, parts: LossParts | None, samples: int, *, again: bool = False) -> None:
        """Add a micro batch: losses `[B]`, weights `[B]`, metrics 0-d; none of them if it has no sample of the set.

        Args:
            again: the samples are those of the call before, and counted.
        """
        self.samples += 0 if again else samples
        if parts is None or not samples:
            return
        losses, weights, metrics = parts
        self._losses.append(losses.float().flatten())
        self._weights.append(weights.float().flatten())
        for name, value in metrics.items():
            self._metrics.setdefault(name, []).append(value.float().view(1))

    def reduce(self) -> ValidationTotals:
        """Sum over all ranks, which all call this."""
        mine = ValidationTotals(
            _sum(self._losses),
            _sum(self._weights),
            self.samples,
            {name: _sum(values) for name, values in self._metrics.items()},
        )
        every = everywhere(mine)
        return ValidationTotals(
            math.fsum(one.loss for one in every),
            math.fsum(one.weight for one in every),
            sum(one.samples for one in every),
            {
                name: math.fsum(one.metrics.get(name, 0.0) for one in every)
                for name in sorted({name for one in every for name in one.metrics})
            },
        )


@dataclass(frozen=True)
class ValidationTotals:
    """Sums over a validation set, of one rank or of all. Ranks that share a model each count its samples."""

    loss: float
    weight: float
    samples: int
    metrics: dict[str, float]

    def means(self) -> dict[str, float]:
        """`val_loss`, and the metrics with `val_` before their names; NaN where nothing has a weight."""
        sums = {"loss": self.loss, **self.metrics}
        return {
            f"val_{name}": value / self.weight if self.weight > 0 else math.nan
            for name, value in sums.items()
        }


def _sum(values: Sequence[torch.Tensor]) -> float:
    """The sum of all elements, in float64; exact but for one rounding."""
    numbers = torch.cat(list(values)).tolist() if values else []
    # fsum raises on infinities of both signs.
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.nan


@contextmanager
def left_as_it_was(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Put a model in eval mode, and afterwards modes, generators and what FSDP2 remembers of forward passes back."""
    modes = [(module, module.training) for module in model.modules()]
    generators = accelerator.rng_state()
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        accelerator.set_rng_state(generators)
        plans: Any = model.sharding_plans
        for root in sharded_roots(model, plans):
            if isinstance(root, FSDPModule):
                _reset(root)


def _reset(root: FSDPModule) -> None:
    """Forward passes without a backward pass leave the root gathered, and their order would be that in which the next
    backward pass prefetches.
    """
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
        return
    module: Any = root  # torch before 2.13, where only the memory can be given back
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def build_validation(
    job: TrainingJob, dataset: Any, model: nn.Module, passes: Passes | PipelineStep, accelerator: Accelerator
) -> Validation | None:
    """The validation of a job; None where there is none: `dataset.validation` is the validation set, if there is one.

    Raises:
        DataError: it has no sample.
    """
    flags = job.flags
    validation_set = getattr(dataset, "validation", None)
    if validation_set is None or flags.eval_iters == 0:
        if flags.eval_interval is not None and flags.eval_iters != 0:
            log.warning(
                "--eval-interval %d has no effect: %s has no validation set",
                flags.eval_interval,
                type(dataset).__name__,
            )
        return None
    sharded: Any = model
    mesh: ParallelMesh = sharded.parallel_mesh
    seed = keyed_seed(flags.seed, "validation") % 2**31
    task = mm_core.TASK_MAPPINGS[job.components["task"].model_id](model, seed=seed, device=accelerator.device)
    batches = ValidationBatches(
        validation_set,
        job.data,
        seed=seed,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        micro_batch_size=flags.micro_batch_size,
        num_workers=flags.num_workers,
        limit=None if flags.eval_iters is None else flags.eval_iters * flags.global_batch_size,
    )
    forward = None
    if not isinstance(passes, Passes):
        from mm_core.training.pipeline_forward import PipelineForward  # few jobs have stages

        forward = PipelineForward(passes, task)
    interval = flags.eval_interval or INTERVAL
    log.info(
        "validation with %s samples every %d steps and after the last one",
        "the" if batches.size is None else human_count(batches.size),
        interval,
    )
    return Validation(
        model, task, batches, mesh=mesh, accelerator=accelerator, interval=interval, last_step=flags.train_iters,
        forward=forward,
    )  # fmt: skip
