"""One training run, from a checked job to saved weights. It reads from top to bottom."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

import mm_core
from mm_core.accelerator import Accelerator
from mm_core.config import TrainingJob
from mm_core.config.model import ModelConfig
from mm_core.data.streams import is_streamed
from mm_core.models.factory import build_model
from mm_core.models.kernels import Computation
from mm_core.models.sora import EncoderUse
from mm_core.models.text_encoders import check_vocabulary
from mm_core.models.transformers_model import TransformersModel
from mm_core.models.vocabulary import check_network_vocabulary
from mm_core.observe.callback import RunContext, StepRecord
from mm_core.sharding.parameters import part_parameters
from mm_core.training.ahead import StepInputs
from mm_core.training.bad_batch import bad_batch_kept
from mm_core.training.batches import TrainingBatches
from mm_core.training.callbacks import build_callbacks
from mm_core.training.changes import identity, learning_rate
from mm_core.training.clip_shapes import check_clip_shapes
from mm_core.training.describe import describe
from mm_core.training.ema import ExponentialAverage
from mm_core.training.experts import ExpertPasses
from mm_core.training.export import Exported, check_export, export
from mm_core.training.initial_weights import load_initial_weights
from mm_core.training.looks import Looks
from mm_core.training.optimizer import build_optimizer, set_learning_rate
from mm_core.training.parameter_groups import group_settings
from mm_core.training.resume import Resume, find_resume, loader_state
from mm_core.training.run_folder import RunFolder
from mm_core.training.samples import build_samples
from mm_core.training.saving import CheckpointSaver
from mm_core.training.step import (
    GradientExchange,
    Passes,
    StepReport,
    SumsExchange,
    UnusedParameters,
    sharded_roots,
)
from mm_core.training.sums import StepSums
from mm_core.training.updates import ExpertUpdates, build_updates
from mm_core.training.validation import build_validation
from mm_core.weights.retention import Retention
from mm_core.weights.stored import StoredWeights
from mm_core.weights.writing import Contents
from mm_registry import default_manager

if TYPE_CHECKING:
    from mm_core.training.pipeline import PipelineStep

log = logging.getLogger(__name__)


class Trainer:
    """Builds everything that a job names; `train()` runs it.

    The process group exists already. Every rank builds the same objects; rank 0 alone writes metrics and configuration.

    Args:
        job: checked configuration.
        accelerator: the device of this rank.
        run: the run's folder, opened by rank 0; `None` when nothing is saved.
        dataset: of the job, from `build_dataset`.
        resume: from `find_resume`, if that was asked before.
    """

    def __init__(
        self,
        job: TrainingJob,
        accelerator: Accelerator,
        run: RunFolder | None,
        dataset: Any,
        resume: Resume | None = None,
    ) -> None:
        flags = job.flags
        self.job, self.flags, self.accelerator, self.run = job, flags, accelerator, run
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = accelerator.device
        self.resume = resume = resume or find_resume(job, dataset)
        self.step = resume.step if resume else 0
        self.consumed_samples = resume.consumed_samples if resume else 0
        # How each component's weights lay in the folder that they came from.
        self.stored = resume.stored if resume else {}
        self.exported_at = -1
        sizes = job.parallel
        self.accumulation = flags.accumulation_steps(sizes.data_parallel(self.world_size))

        where = Computation.of(self.device, job.fsdp2.param_dtype, shares_sequences=sizes.cp > 1)
        self.model = build_model(job.components, device=self.device, hooks=job.hooks, where=where)
        if isinstance(job.model, ModelConfig):
            use = EncoderUse(job.model.encoder_offload_interval, job.model.enable_encoder_dp)
            self.model.encoder_use = use
        check_clip_shapes(dataset, self.model)
        tokenizer_size = getattr(dataset, "tokenizer_size", None)
        text_encoder = getattr(self.model, "text_encoder", None)
        if tokenizer_size is not None and text_encoder is not None:
            check_vocabulary(text_encoder, tokenizer_size, tokenizer="tokenizer_config")
        elif tokenizer_size is not None and isinstance(self.model, TransformersModel):
            check_network_vocabulary(self.model, tokenizer_size)
        self.model.fully_shard(None, job.fsdp2, sizes)
        self.mesh = mesh = self.model.parallel_mesh
        self.trained = trained = self.model.trained
        for name, module in trained.items():
            initial = load_initial_weights(module, name, job, self.device)
            if initial is not None:
                self.stored[name] = initial
        self.model.train()
        self.parameters = [p for module in trained.values() for p in module.parameters() if p.requires_grad]
        # With `clip_grad_async` the host never waits for a step: a bad one is skipped on the device and noticed a step later.
        self.clip_grad_async = job.model.patch.clip_grad_async
        settings = group_settings(trained, flags, self.model.sharding_roots())
        self.optimizer = build_optimizer(
            self.parameters, flags, settings=settings, skips_on_device=self.clip_grad_async
        )
        roots = sharded_roots(self.model, self.model.sharding_plans)
        self.exchange = GradientExchange(roots, self.model.device_mesh, self.accumulation)
        self.exchange_of_sums = SumsExchange(UnusedParameters(roots, self.device, sizes.pp), mesh)
        self.failed = torch.zeros(
            (), device=self.device
        )  # 1 once a step was bad: none after it changes a weight
        self.reports: deque[StepReport] = deque()  # steps whose numbers were not read yet
        self.learning_rate = learning_rate(flags)
        self.ema = None if flags.ema_decay is None else ExponentialAverage(trained, flags.ema_decay)
        task = mm_core.TASK_MAPPINGS[job.components["task"].model_id]
        self.task = task(self.model, seed=flags.seed, device=self.device)
        self.updates = build_updates(
            trained, self.optimizer,
            experts=getattr(self.model, "experts", ()),
            offload=job.fsdp2.offload_idle_predictor and not job.fsdp2.offload_to_cpu,
            ranks=self.model.device_mesh.size() * mesh.sizes.tp, max_norm=flags.clip_grad, stages=mesh.pp_group,
            ema=self.ema,
        )  # fmt: skip
        self.passes = self._build_passes()
        if resume is not None:
            resume.restore(trained, self.optimizer, self.ema, flags)
        # What is built or started from here on may draw, and would do so once more than in a run that was not interrupted.
        self.generators = accelerator.rng_state() if resume is not None else None
        self.dataset_samples = None if is_streamed(dataset) else len(dataset)
        self.batches = TrainingBatches(
            job, dataset, mesh,
            accumulation=self.accumulation, consumed_samples=self.consumed_samples,
            position=resume.position if resume else None, owners=getattr(self.task, "owners", None),
        )  # fmt: skip
        self.inputs = StepInputs(
            lambda indices: self.task.prepare(self.batches.step(indices)),
            accelerator, encode_ahead=flags.encode_ahead, streamed=is_streamed(dataset),
        )  # fmt: skip
        self.looks = Looks(
            build_validation(job, dataset, self.model, self.passes, accelerator),
            build_samples(job, self.model, mesh, accelerator, run.path if run else None),
            self.ema if flags.eval_ema else None,
        )
        if flags.save_hf:
            check_export(self.exported())
        self.callbacks = build_callbacks(
            job, run, rank=self.rank, step=self.step, device=self.device, resolved=self._resolved
        )
        self.saver = None if run is None else self._build_saver(run)

    # -- building ---------------------------------------------------------------------------------------------------

    def _build_passes(self) -> Passes | PipelineStep:
        """What runs the forward and backward passes of a step."""
        if isinstance(self.updates, ExpertUpdates):
            mesh = self.model.device_mesh
            return ExpertPasses(self.model, self.task, list(self.trained), mesh, self.updates)
        if self.mesh.pp is None:
            return Passes(self.model, self.task, self.exchange, self.accumulation)
        from mm_core.training.pipeline import PipelineStep  # few jobs have stages

        return PipelineStep(self.model, self.task, self.mesh, self.accumulation, self.device, self.exchange)

    def _build_saver(self, run: RunFolder) -> CheckpointSaver:
        flags = self.flags
        source = None if self.resume is None else self.resume.checkpoint
        return CheckpointSaver(
            run.path,
            asynchronous=not flags.no_async_save,
            retention=Retention(flags.keep_last, flags.keep_every, protected=source),
            patience=timedelta(minutes=flags.distributed_timeout_minutes),
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of the job; the same all through a run."""
        return {**identity(self.job), "config": self._resolved()}

    def _resolved(self) -> dict[str, Any]:
        """The configuration with origins and trace, and what it became: plugins' fingerprint and sharding plans."""
        shards = self.model.device_mesh.size(-1)
        return {
            **self.job.resolved(),
            "fingerprint": default_manager().fingerprint(),
            "sharding": {
                path or ".": plan.as_dict(shards, self.model.device_mesh.size())
                for path, plan in self.model.sharding_plans.items()
            },
            "parameters": [p.as_dict() for p in part_parameters(self.model, self.model.sharding_plans)],
        }

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, stop_requested: Callable[[], bool]) -> bool:
        """Run to `--train-iters`, or until a stop is asked for.

        Args:
            stop_requested: called at the end of each step's last backward pass; true after SIGTERM. The ranks agree on it.

        Returns:
            Whether the run ended because it was asked to.
        """
        flags = self.flags
        context = RunContext(
            self.rank, self.world_size, self.step, flags.train_iters, flags.log_interval,
            self.run.path if self.run else None, self.model,
        )  # fmt: skip
        saved_at = self.step if self.step else -1
        stopping = False
        with ExitStack() as ends:  # each callback gets its end, also when another one's fails
            for callback in self.callbacks:
                ends.callback(callback.on_train_end, context)
                callback.on_train_start(context)
            if self.saver is not None:
                ends.enter_context(self.saver)  # the last checkpoint is complete before a callback ends
            folder = None if self.run is None else self.run.path
            ends.enter_context(bad_batch_kept(folder, self.rank, self.trained, self.batches.again))
            ends.callback(self.updates.all_here)
            ends.enter_context(self.inputs)
            describe(self)
            if self.generators is not None:
                self.accelerator.set_rng_state(self.generators)
            if self.step == 0:
                self.looks.before_training(stop_requested)
            while self.step < flags.train_iters and not stopping:
                for callback in self.callbacks:
                    callback.on_step_start(context, self.step + 1)
                self.reports.append(self._train_step(stop_requested))
                stopping = self._look(context, stop_requested)
                stopping = self._tell(context, unread=1 if self.clip_grad_async else 0) or stopping
                if flags.exit_interval and self.step % flags.exit_interval == 0:
                    break
                if flags.save_interval and self.step % flags.save_interval == 0:
                    stopping = self._tell(context) or stopping  # nothing bad is saved
                    self.save()
                    self.export()
                    saved_at = self.step
            stopping = self._tell(context) or stopping
            if saved_at != self.step:
                self.save()
            if self.saver is not None and self.flags.save_hf:
                self.saver.finish()  # after SIGTERM there may be no time for more than the checkpoint
            self.export()  # also of a run that was killed between its last checkpoint and this
        return stopping

    def _train_step(self, stop_requested: Callable[[], bool]) -> StepReport:
        """One optimizer step over the global batch."""
        started = time.perf_counter()
        flags = self.flags
        indices: list[int] = []
        sums = StepSums(self.device, self.updates.parts)
        self.passes.run(self.inputs.step(indices, more=self.step + 1 < flags.train_iters), sums)
        save_failed = self.saver is not None and self.saver.failed
        reduced, mismatch = self.exchange_of_sums.reduce(sums, stop_requested(), save_failed=save_failed)
        norm, part_norms = self.updates.norms(reduced)
        rate = self.learning_rate(self.step + 1)
        report = StepReport(self.step + 1, reduced, norm, mismatch, self.rank, indices, sums.samples, rate)
        report.consumed_samples = self.consumed_samples + flags.global_batch_size
        report.part_norms = part_norms
        report.send(self.accelerator)
        set_learning_rate(self.optimizer, rate)
        if self.clip_grad_async:
            self.failed = torch.maximum(self.failed, report.bad)
            self.optimizer.found_inf = self.failed  # as a GradScaler does
        else:
            report.read()  # raises before a weight is changed
        self.updates.step()

        self.step += 1
        self.consumed_samples += flags.global_batch_size
        self.inputs.rest()  # what comes between steps may use the encoders
        if not self.clip_grad_async:
            self.accelerator.synchronize()
        report.seconds = time.perf_counter() - started
        return report

    def _look(self, context: RunContext, stop_requested: Callable[[], bool]) -> bool:
        """Validate and make sample videos if it is time, and leave the numbers in the step's report; as `_tell`, which comes
        after it.
        """
        if not self.looks.due(self.step):
            return False
        stopping = self._tell(context, unread=1)
        report = self.reports[-1]
        total, *_ = report.read()  # nothing bad is looked at
        if not (stopping or total.stop):  # after SIGTERM there may be no time for more than the checkpoint
            self.updates.all_here()
            report.validation = self.looks.run(self.step, stop_requested)
        return stopping

    def _tell(self, context: RunContext, unread: int = 0) -> bool:
        """Read the reports of past steps, all but the last `unread`, and hand them to the callbacks.

        Returns:
            Whether a rank was asked to stop.
        """
        stopping = False
        while len(self.reports) > unread:
            report = self.reports.popleft()
            total, loss, norm = report.read()
            record = StepRecord(
                step=report.step,
                loss=loss,
                grad_norm=norm,
                lr=report.rate,
                seconds=report.seconds,
                samples_per_second=self.flags.global_batch_size / report.seconds,
                # Ranks that share a sequence or tensors count the same ones.
                tokens_per_second=total.tokens / (self.mesh.sizes.cp * self.mesh.sizes.tp) / report.seconds,
                memory_bytes=self.accelerator.max_memory_bytes(),
                consumed_samples=report.consumed_samples,
                extra={name: value / total.weight for name, value in total.metrics.items()}
                | report.parts()
                | report.validation,
            )
            for callback in self.callbacks:
                callback.on_step_end(context, record)
            if self.saver is not None:
                self.saver.poll(total.save_failed)
            stopping = stopping or total.stop
        return stopping

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Save a checkpoint of this step (all ranks call it); nothing without `--save`."""
        if self.saver is None:
            return
        self.updates.all_here()
        optimizer = None if self.flags.no_save_optim else self.optimizer
        modules, rng = self.saved_modules(), not self.flags.no_save_rng
        contents = Contents(modules, optimizer, self.state(), rng, self.mesh.sizes.pp, self.mesh.told_stage)
        self.saver.save(self.step, contents)

    def export(self) -> None:
        """Write the weights of this step as Hugging Face folders (all ranks call it), if `--save-hf` asks for it."""
        if self.run is None or not self.flags.save_hf or self.exported_at == self.step:
            return
        self.updates.all_here()
        export(self.run.path, self.step, self.exported())
        self.exported_at = self.step

    def exported(self) -> dict[str, Exported]:
        """What `--save-hf` writes: what is trained, and its averages."""
        return {
            name: Exported(
                module,
                self.job.components[name],
                self.stored.get(name, StoredWeights()),
                None if self.ema is None else self.ema.tensors(name),
            )
            for name, module in self.trained.items()
        }

    def saved_modules(self) -> dict[str, nn.Module]:
        """The modules of a checkpoint: what is trained, and its averages."""
        return {**self.trained, **(self.ema.modules() if self.ema is not None else {})}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors and generators (all ranks call it)."""
        optional = {
            "dataset_samples": self.dataset_samples,
            "weights": {name: stored.as_json() for name, stored in self.stored.items()} or None,
            "ema": {"decay": self.ema.decay} if self.ema is not None else None,
        }
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "seed": self.flags.seed,
            **self.identity,
            **{name: value for name, value in optional.items() if value is not None},
            **loader_state(self.batches.loader, self.job),
        }
