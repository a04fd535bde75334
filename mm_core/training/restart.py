"""What a rank does that was started again, by `mm train` or by torchrun: it goes on from its run's last checkpoint."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist

from mm_core.config import TrainingJob
from mm_core.config.environment import read, whole_number
from mm_core.training.run_folder import RunFolder
from mm_core.weights.layout import latest_checkpoint


def job_token() -> str | None:
    """The job that this rank belongs to, if its ranks may be started again."""
    token = read("MM_JOB")
    if token is None and whole_number("TORCHELASTIC_RESTART_COUNT", 0) > 0:
        token = read("TORCHELASTIC_RUN_ID")  # plain torchrun
    return token


def continue_own_run(job: TrainingJob, run: RunFolder) -> TrainingJob:
    """Return the job as it has to go on after a restart: from the last complete checkpoint of its own run, whatever
    `--load` named at first. Every rank calls this; rank 0 looks.
    """
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        restarted = whole_number("TORCHELASTIC_RESTART_COUNT", 0) > 0 and read("MM_JOB") is None
        if restarted or run.belongs_to(job_token()):
            checkpoint = latest_checkpoint(run.path)
            found[0] = None if checkpoint is None else str(run.path)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return job
    flags = job.flags
    update = {
        "load": found[0],
        "finetune": False,
        "no_load_optim": flags.no_save_optim,
        "no_load_rng": flags.no_save_rng,
    }
    return dataclasses.replace(job, flags=flags.model_copy(update=update))
