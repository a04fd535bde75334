"""One training run, from a checked job to saved weights. It reads from top to bottom."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

import mm_core
from mm_core.accelerator import Accelerator
from mm_core.config import TrainingJob
from mm_core.config.document import expanded
from mm_core.data import build_loader
from mm_core.models.factory import build_sora_model
from mm_core.models.pretrained import load_predictor_folder
from mm_core.models.text_encoders import check_vocabulary
from mm_core.observe.callback import Callback, RunContext, StepRecord
from mm_core.observe.console import ConsoleProgress, human_count, show
from mm_core.observe.metrics import MetricsFile, TensorBoard
from mm_core.observe.profiler import StaticProfile
from mm_core.observe.step_log import StepLog
from mm_core.sharding.table import plan_texts
from mm_core.training.gradients import scale_and_clip
from mm_core.training.optimizer import build_optimizer
from mm_core.training.run_folder import RunFolder
from mm_core.training.schedule import LearningRate
from mm_core.training.step import GradientExchange, StepReport, UnusedParameters, sharded_roots
from mm_core.training.sums import StepSums
from mm_core.weights import is_hf_folder, load_checkpoint, materialize, resolve_load, save_checkpoint
from mm_registry import default_manager
from mm_registry.errors import UserError

log = logging.getLogger(__name__)


def changed_plugins(before: Mapping[str, str], now: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each distribution in use whose version is not the checkpoint's."""
    lines = []
    for name in sorted({*before, *dict(now)}):
        old, new = before.get(name, "absent"), dict(now).get(name, "absent")
        if old != new:
            lines.append(f"{name} is {new}, and was {old} when the checkpoint was written")
    return lines


class Trainer:
    """Builds everything that a job names; `train()` runs it.

    The process group exists already. Every rank builds the same objects; rank 0 alone writes metrics and configuration.

    Args:
        job: checked configuration.
        accelerator: the device of this rank.
        run: the run's folder, opened by rank 0; `None` when nothing is saved.
        dataset: of the job, from `build_dataset`.
    """

    def __init__(
        self, job: TrainingJob, accelerator: Accelerator, run: RunFolder | None, dataset: Any
    ) -> None:
        flags = job.flags
        self.job, self.flags, self.accelerator, self.run = job, flags, accelerator, run
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = accelerator.device
        self.step = 0
        self.consumed_samples = 0
        self.loaded: dict[str, Any] = {}  # what the checkpoint that is continued says of its run
        self.accumulation = flags.accumulation_steps(self.world_size)

        self.model = build_sora_model(job.components, device=self.device, hooks=job.hooks)
        tokenizer_size = getattr(dataset, "tokenizer_size", None)
        if tokenizer_size is not None and self.model.text_encoder is not None:
            check_vocabulary(self.model.text_encoder, tokenizer_size, tokenizer="tokenizer_config")
        self.model.fully_shard(None, job.fsdp2)
        self._load_initial_weights()
        self.model.train()
        self.parameters = [p for p in self.model.predictor.parameters() if p.requires_grad]
        # With `clip_grad_async` the host never waits for a step: a bad one is skipped on the device and noticed a step later.
        self.clip_grad_async = job.model.patch.clip_grad_async
        self.optimizer = build_optimizer(self.parameters, flags, skips_on_device=self.clip_grad_async)
        roots = sharded_roots(self.model, self.model.sharding_plans)
        self.exchange = GradientExchange(roots, self.model.device_mesh, self.accumulation)
        self.unused = UnusedParameters(roots, self.device)
        self.failed = torch.zeros(
            (), device=self.device
        )  # 1 once a step was bad: none after it changes a weight
        self.reports: deque[StepReport] = deque()  # steps whose numbers were not read yet
        self.learning_rate = LearningRate(
            peak=flags.lr,
            minimum=flags.min_lr or 0.0,
            style=flags.lr_decay_style,
            warmup_steps=flags.warmup_steps,
            warmup_init=flags.lr_warmup_init,
            decay_steps=flags.lr_decay_iters or flags.train_iters,
        )
        task = mm_core.TASK_MAPPINGS[job.components["task"].model_id]
        self.task = task(self.model, seed=flags.seed, device=self.device)
        self._resume()
        self.batches = self._build_batches(dataset)
        self.callbacks = self._build_callbacks()

    # -- building ---------------------------------------------------------------------------------------------------

    def _load_initial_weights(self) -> None:
        """Give the sharded predictor its storage, then its values: keyed random ones, or those of a Hugging Face folder."""
        predictor, section, load = self.model.predictor, self.job.components["predictor"], self.flags.load
        folder = section.from_pretrained if section.init == "pretrained" else None
        if load is not None:  # a run, whose checkpoint `_resume` reads, or a Hugging Face folder
            folder = load if is_hf_folder(expanded(load)) else None
        random_init = folder is None and load is None
        materialize(predictor, self.device, self.flags.seed, random_init=random_init)
        if folder is not None:
            load_predictor_folder(predictor, folder, section)
            log.info("predictor: weights of %s", folder)
        elif random_init:
            log.info("predictor has random weights, as its section asks")

    def _resume(self) -> None:
        """Continue from `--load`, when it names a run or a checkpoint."""
        flags = self.flags
        if flags.load is None or is_hf_folder(expanded(flags.load)):
            return
        checkpoint = resolve_load(expanded(flags.load))
        fresh = flags.finetune
        state = load_checkpoint(
            checkpoint,
            {"predictor": self.model.predictor},
            None if fresh or flags.no_load_optim else self.optimizer,
            with_rng=not (fresh or flags.no_load_rng),
        )
        if fresh:
            log.info("predictor: weights of %s; the run starts at step 0 (--finetune)", checkpoint)
            return
        self.loaded = state
        if state["seed"] != flags.seed:
            raise UserError(
                f"--seed {flags.seed}: the run that --load continues has seed {state['seed']}, and order, noise and timesteps "
                f"would change in its middle; use --seed {state['seed']}, or --finetune to start another run from its weights."
            )
        for line in changed_plugins(state["plugins"], self.job.plugins):
            log.warning("%s", line)
        self.step = int(state["step"])
        self.consumed_samples = int(state["consumed_samples"])
        log.info("continuing %s after step %d", checkpoint, self.step)
        if self.step >= flags.train_iters:
            log.warning(
                "nothing is left to train: --train-iters is %d, and the checkpoint is of step %d",
                flags.train_iters,
                self.step,
            )

    def _build_batches(self, dataset: Any) -> Iterator[dict[str, Any]]:
        flags = self.flags
        self.dataset_samples = len(dataset)
        before = self.loaded.get("dataset_samples", self.dataset_samples)
        if before != self.dataset_samples:
            log.warning(
                "the dataset has %d samples, and had %d when the checkpoint was written: the order of samples changes from here",
                self.dataset_samples,
                before,
            )
        loader = build_loader(
            dataset,
            self.job.data,
            seed=flags.seed,
            dp_rank=self.rank,
            dp_size=self.world_size,
            micro_batch_size=flags.micro_batch_size,
            global_batch_size=flags.global_batch_size,
            num_workers=flags.num_workers,
            consumed_samples=self.consumed_samples,
        )
        return iter(loader)

    def _build_callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = [ConsoleProgress(), StepLog(self.flags.global_batch_size)]
        if self.run is not None:
            if self.rank == 0:
                self.run.cut_metrics(self.step)
                self.run.write_config(self._resolved())
            callbacks.append(MetricsFile(self.run.metrics))
        board = self.flags.tensorboard_dir or (
            self.run.path / "tensorboard" if self.run is not None else None
        )
        if board is not None:
            callbacks.append(TensorBoard(expanded(str(board))))
        if self.job.tools.profile.enable:
            callbacks.append(StaticProfile(self.job.tools))
        for spec in self.job.callbacks:
            callback: Any = default_manager().load(spec)
            callbacks.append(callback())
        return callbacks

    def _resolved(self) -> dict[str, Any]:
        """The configuration with origins and trace, and what it became: plugins' fingerprint and sharding plans."""
        shards = self.model.device_mesh.size(-1)
        return {
            **self.job.resolved(),
            "fingerprint": default_manager().fingerprint(),
            "sharding": {
                path or ".": plan.as_dict(shards, self.world_size)
                for path, plan in self.model.sharding_plans.items()
            },
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
            self._describe()
            while self.step < flags.train_iters and not stopping:
                for callback in self.callbacks:
                    callback.on_step_start(context, self.step + 1)
                self.reports.append(self._train_step(stop_requested))
                stopping = self._tell(context, unread=1 if self.clip_grad_async else 0)
                if flags.exit_interval and self.step % flags.exit_interval == 0:
                    break
                if flags.save_interval and self.step % flags.save_interval == 0:
                    stopping = self._tell(context) or stopping  # nothing bad is saved
                    self.save()
                    saved_at = self.step
            stopping = self._tell(context) or stopping
            if saved_at != self.step:
                self.save()
        return stopping

    def _micro_batches(self, indices: list[int]) -> Iterator[dict[str, Any]]:
        """The micro batches of one optimizer step, read when they are asked for; their samples are noted."""
        for batch in itertools.islice(self.batches, self.accumulation):
            indices += batch["sample_index"].tolist()
            yield batch

    def _train_step(self, stop_requested: Callable[[], bool]) -> StepReport:
        """One optimizer step over the global batch."""
        started = time.perf_counter()
        flags = self.flags
        indices: list[int] = []
        sums = StepSums(self.device)
        count = 0
        for count, inputs in enumerate(self.task.prepare(self._micro_batches(indices)), start=1):
            outputs = self.task.forward(self.model, inputs)
            losses, weights, metrics = self.task.loss(outputs, inputs)
            self.exchange.begin(count - 1)
            losses.sum().backward()
            sums.add(losses, weights, metrics, self.task.tokens(inputs))
        assert count == self.accumulation, f"the task made {count} of {self.accumulation} micro batches"
        reduced = sums.reduce(stop_requested(), self.unused.numbers())
        self.unused.drop(reduced.others)

        # FSDP averages gradients over the ranks; what is wanted is their sum divided by the weight of the whole global batch.
        norm = scale_and_clip(self.parameters, self.world_size / reduced.weight, flags.clip_grad)
        rate = self.learning_rate(self.step + 1)
        report = StepReport(
            self.step + 1, reduced, norm, self.unused.mismatch(reduced.others), self.rank, indices, rate
        )
        report.send(self.accelerator)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.clip_grad_async:
            self.failed = torch.maximum(self.failed, report.bad)
            self.optimizer.found_inf = self.failed  # as a GradScaler does
        else:
            report.read()  # raises before a weight is changed
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.step += 1
        self.consumed_samples += flags.global_batch_size
        if not self.clip_grad_async:
            self.accelerator.synchronize()
        report.seconds = time.perf_counter() - started
        report.consumed_samples = self.consumed_samples
        return report

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
                tokens_per_second=total.tokens / report.seconds,
                memory_bytes=self.accelerator.max_memory_bytes(),
                consumed_samples=report.consumed_samples,
                extra={name: value / total.weight for name, value in total.metrics.items()},
            )
            for callback in self.callbacks:
                callback.on_step_end(context, record)
            stopping = stopping or total.stop
        return stopping

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step (all ranks call it); nothing without `--save`."""
        if self.run is None:
            return
        path = save_checkpoint(
            self.run.path,
            self.step,
            {"predictor": self.model.predictor},
            None if self.flags.no_save_optim else self.optimizer,
            {
                "step": self.step,
                "consumed_samples": self.consumed_samples,
                "seed": self.flags.seed,
                "dataset_samples": self.dataset_samples,
                "plugins": dict(self.job.plugins),
                "config": self._resolved(),
            },
            with_rng=not self.flags.no_save_rng,
        )
        log.info("checkpoint %s", path)

    def _describe(self) -> None:
        if self.rank == 0:
            shards = self.model.device_mesh.size(-1)
            show(plan_texts(self.model.sharding_plans, shards, self.world_size))
        trained = sum(p.numel() for p in self.parameters)
        log.info(
            "training %s parameters on %d × %s (%s); global batch %d = %d ranks × micro batch %d × %d accumulated",
            human_count(trained), self.world_size, self.device.type, dist.get_backend(), self.flags.global_batch_size,
            self.world_size, self.flags.micro_batch_size, self.accumulation,
        )  # fmt: skip
        log.info(
            "%s; %s",
            self.exchange,
            "clipped without waiting for the device" if self.clip_grad_async else "clipped at once",
        )
