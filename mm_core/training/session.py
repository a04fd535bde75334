"""From a command line to a finished run: launch ranks, join them, open the run's folder, train, leave in order."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mm_core.accelerator import Accelerator
from mm_core.config import TrainingJob
from mm_core.data import build_dataset
from mm_core.observe.console import setup_logging
from mm_core.training.launch import LocalRanks, check_launch, die_with_parent, started_by_launcher
from mm_core.training.precheck import check_build
from mm_core.training.run_folder import RunFolder
from mm_core.training.stop import EXIT_TERMINATED, StopSignal
from mm_core.training.trainer import Trainer
from mm_core.weights import is_hf_folder, resolve_load
from mm_registry import default_manager
from mm_registry.errors import UserError

log = logging.getLogger(__name__)


def train(job: TrainingJob, argv: Sequence[str]) -> int:
    """Train a checked job and return the exit code: 0, or 143 after SIGTERM.

    Args:
        job: from `load_training_job`.
        argv: the command line after `mm train`; child ranks get the same.

    Raises:
        UserError: the model, the policy and the files do not fit together; raised before a rank is started.
    """
    check_launch(job.flags)
    check_build(job)
    # Annotations and headers are read before weights, and before anything is written.
    dataset = build_dataset(job.components["dataset"], job.flags.seed)
    if started_by_launcher():
        die_with_parent()
        return _train_rank(job, dataset, None)
    with LocalRanks(job.flags, argv) as children:
        return _train_rank(job, dataset, children)


def _train_rank(job: TrainingJob, dataset: Any, children: LocalRanks | None) -> int:
    accelerator = Accelerator.current()
    accelerator.init_process_group(job.flags.distributed_backend, job.flags.distributed_timeout_minutes)
    rank = dist.get_rank()
    run = RunFolder(Path(job.flags.save)) if job.flags.save else None
    try:
        _agree(job)
        removed = _open(run, job, rank)
        setup_logging(rank, run.logs if run else None)
        for name in removed:
            log.info("removed %s, left by a run that was killed", name)
        if run is None:
            log.warning("without --save nothing is kept of this run: no checkpoints, no metrics.jsonl")
        for finding in job.findings:
            log.log(logging.WARNING if finding.level == "warning" else logging.INFO, "%s", finding)
        if job.flags.use_deter_comp:
            accelerator.deterministic()
        accelerator.seed_all(job.flags.seed + rank)
        with StopSignal(children.terminate if children else None) as stop:
            stopped = Trainer(job, accelerator, run, dataset).train(lambda: stop.requested)
        # Only an orderly end: after a failure the peers may stand in a collective, and waiting for them would hang.
        dist.destroy_process_group()
        return EXIT_TERMINATED if stopped else 0
    finally:
        if run is not None:
            run.close()


def _agree(job: TrainingJob) -> None:
    """Every rank must have read the same configuration and see the same plugins.

    Raises:
        UserError: on every rank, naming the ranks that differ from rank 0.
    """
    if dist.get_world_size() == 1:
        return
    text = default_manager().fingerprint() + json.dumps(job.resolved()["values"], sort_keys=True, default=str)
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).long()
    digests = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(digests, digest)
    odd = [i for i, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if odd:
        raise UserError(
            f"ranks {odd} read another configuration or see other plugins than rank 0; every machine needs the same files "
            "and the same installed distributions (compare `mm list` on each)."
        )


def _open(run: RunFolder | None, job: TrainingJob, rank: int) -> list[str]:
    """Rank 0 opens the run's folder; when it cannot, every rank raises. Return what rank 0 removed from it."""
    removed: list[str] = []
    if run is None:
        return removed
    message = [""]
    if rank == 0:
        try:
            removed = run.open(continued=_continued(run, job))
        except UserError as error:
            message = [str(error)]
        except OSError as error:
            message = [f"--save {run.path}: the run's folder cannot be prepared ({error})."]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise UserError(message[0])
    return removed


def _continued(run: RunFolder, job: TrainingJob) -> Path | None:
    """The checkpoint of the run's own folder from which the job goes on; `None` if it starts another run."""
    load = Path(job.flags.load) if job.flags.load else None
    if load is None or job.flags.finetune or is_hf_folder(load):
        return None
    return resolve_load(load) if load.resolve().is_relative_to(run.path.resolve()) else None
