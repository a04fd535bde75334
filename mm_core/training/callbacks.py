"""The observers of a training run: those that every run has, and those that the job asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mm_core.config import TrainingJob
from mm_core.config.document import expanded
from mm_core.observe.callback import Callback
from mm_core.observe.console import ConsoleProgress
from mm_core.observe.metrics import MetricsFile, TensorBoard
from mm_core.observe.profiler import StaticProfile
from mm_core.observe.step_log import StepLog
from mm_core.training.expert_load import ExpertLoadLog
from mm_core.training.run_folder import RunFolder
from mm_registry import default_manager


def build_callbacks(
    job: TrainingJob,
    run: RunFolder | None,
    *,
    rank: int,
    step: int,
    device: torch.device,
    resolved: Callable[[], dict[str, Any]],
) -> list[Callback]:
    """Build the callbacks of a run in the order in which they are told. Rank 0 also writes the run's configuration.

    Args:
        run: the run's folder; `None` when nothing is saved.
        step: steps that were done before; numbers of later ones are cut from the run's metrics.
        device: of this rank.
        resolved: returns the configuration that the run's folder keeps.
    """
    callbacks: list[Callback] = [
        ExpertLoadLog(device), ConsoleProgress(), StepLog(job.flags.global_batch_size),
    ]  # fmt: skip
    if run is not None:
        if rank == 0:
            run.cut_metrics(step)
            run.write_config(resolved())
        callbacks.append(MetricsFile(run.metrics))
    board = job.flags.tensorboard_dir or (run.path / "tensorboard" if run is not None else None)
    if board is not None:
        callbacks.append(TensorBoard(expanded(str(board))))
    if job.tools.profile.enable:
        callbacks.append(StaticProfile(job.tools))
    for spec in job.callbacks:
        callback: Any = default_manager().load(spec)
        callbacks.append(callback())
    return callbacks
