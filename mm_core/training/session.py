"""From a command line to a finished run: launch ranks, join them, open the run's folder, train, leave in order."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mm_core.accelerator import Accelerator
from mm_core.config import TrainFlags, TrainingJob, load_training_job
from mm_core.config.args import clear_args, set_args
from mm_core.config.document import expanded
from mm_core.config.environment import read, whole_number
from mm_core.data import build_dataset
from mm_core.observe.console import setup_logging
from mm_core.training.consensus import agree_on_job, prepared_together
from mm_core.training.launch import (
    LocalRanks,
    check_launch,
    checks_its_machine,
    die_with_parent,
    refuse_machine,
    started_by_launcher,
)
from mm_core.training.membership import Membership
from mm_core.training.precheck import check_build
from mm_core.training.resume import find_resume
from mm_core.training.run_folder import RunFolder
from mm_core.training.stop import EXIT_TERMINATED, StopSignal
from mm_core.training.trainer import Trainer
from mm_core.weights import is_hf_folder, resolve_load
from mm_core.weights.layout import latest_checkpoint
from mm_registry import default_manager
from mm_registry.errors import UserError

log = logging.getLogger(__name__)


def train(job: TrainingJob, argv: Sequence[str], plugins: Mapping[str, Any] | None = None) -> int:
    """Train a checked job, on this process and the ranks that it starts, and return the exit code: 0, or 143
    after SIGTERM.

    Args:
        job: from `load_training_job`.
        argv: the command line after `mm train`; child ranks get the same.
        plugins: the plugin set before the job was loaded, which child ranks compare theirs with; by default that
            of now.

    Raises:
        UserError: the model, the policy and the files do not fit together; raised before a rank is started.
    """
    check_launch(job.flags)
    die_with_parent()
    try:
        if not started_by_launcher():
            Accelerator.current().check_processes(job.flags.nproc_per_node or 1)
        dataset = _prepare(job)
    except UserError as error:
        if not started_by_launcher():
            refuse_machine(job.flags, str(error))
        raise
    if started_by_launcher():  # with a single rank
        with Membership(job.flags) as member:
            member.join(plugins)
            return _train_rank(job, dataset, member)
    if job.flags.elastic:
        from mm_core.training.elastic import run_elastic  # torch's agent takes a while to import

        return run_elastic(job.flags, argv)
    with LocalRanks(job.flags, argv) as children, Membership(job.flags, children) as member:
        member.join(plugins)
        with prepared_together():
            pass  # this rank is ready; the others load the job now
        return _train_rank(job, dataset, member)


def train_launched(flags: TrainFlags, check: Callable[[], None] | None = None) -> int:
    """Train as one of several ranks that a launcher started (torchrun, or `train` of rank 0), and return the exit
    code.

    The ranks meet first: they agree on the plugins before an id means anything, and a mistake that one of them
    finds in its files ends all of them.

    Args:
        flags: of this rank.
        check: what else this rank has to make sure of before it loads the job.

    Raises:
        UserError: the ranks see different plugins, or the job is wrong on some rank; raised on every rank.
    """
    die_with_parent()
    check_launch(flags)
    with Membership(flags) as member:
        member.join()
        with prepared_together():
            if check is not None:
                check()
            job = load_training_job(flags)
            dataset = _prepare(job, build=checks_its_machine())
        return _train_rank(job, dataset, member)


def _prepare(job: TrainingJob, *, build: bool = True) -> Any:
    """Build on the meta device, and open the data: what can be known before weights, devices and ranks.

    Args:
        build: whether this process checks the build; one of a machine is enough, for `agree_on_job` compares the rest.
    """
    # From here on an id means what it meant to the checks.
    default_manager().freeze()
    set_args(job)  # a component may ask for them in its constructor
    if build:
        check_build(job)
    # Annotations and headers are read before weights, and before anything is written.
    return build_dataset(job.components["dataset"], job.flags.seed, job.flags.seq_length)


def _train_rank(job: TrainingJob, dataset: Any, member: Membership) -> int:
    accelerator = Accelerator.current()
    rank = dist.get_rank()
    run = RunFolder(expanded(job.flags.save)) if job.flags.save else None
    try:
        agree_on_job(job)
        if run is not None:
            job = _continue_own_run(job, run)
            set_args(job)
        resume = find_resume(job, dataset)  # before anything is written
        removed = _open(run, job, rank)
        if run is not None:
            member.log_to(run.logs)
        setup_logging(rank, run.logs if run else None)
        for name in removed:
            log.info("removed %s, left by a run that was killed", name)
        for note in getattr(dataset, "notes", ()):  # it was built before there was a log
            log.info("%s", note)
        if run is None:
            log.warning("without --save nothing is kept of this run: no checkpoints, no metrics.jsonl")
        for finding in job.findings:
            log.log(logging.WARNING if finding.level == "warning" else logging.INFO, "%s", finding)
        if job.flags.use_deter_comp:
            accelerator.deterministic()
        # Ranks that share tensors drop the same elements of what each of them has whole.
        accelerator.seed_all(job.flags.seed + rank // job.parallel.tp)
        with StopSignal(member.children.terminate if member.children else None) as stop:
            stopped = Trainer(job, accelerator, run, dataset, resume).train(lambda: stop.requested)
        # Only an orderly end: after a failure the peers may stand in a collective, and waiting for them would hang.
        dist.destroy_process_group()
        return EXIT_TERMINATED if stopped else 0
    finally:
        clear_args()
        if run is not None:
            run.close()


def _open(run: RunFolder | None, job: TrainingJob, rank: int) -> list[str]:
    """Rank 0 opens the run's folder; when it cannot, every rank raises. Return what rank 0 removed from it."""
    removed: list[str] = []
    if run is None:
        return removed
    message = [""]
    if rank == 0:
        try:
            removed = run.open(continued=_continued(run, job), job=_job_token())
        except UserError as error:
            message = [str(error)]
        except OSError as error:
            message = [f"--save {run.path}: the run's folder cannot be prepared ({error})."]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise UserError(message[0])
    return removed


def _job_token() -> str | None:
    """The job that this rank belongs to, if its ranks may be started again."""
    token = read("MM_JOB")
    if token is not None or whole_number("TORCHELASTIC_MAX_RESTARTS", 0) == 0:
        return token
    token = read("TORCHELASTIC_RUN_ID")
    if (
        token == "none"
    ):  # torchrun's default for each job; the folder of its outputs is new with each start of torchrun
        token = Path(read("TORCHELASTIC_ERROR_FILE") or "").parent.parent.parent.name
    return token or None


def _continue_own_run(job: TrainingJob, run: RunFolder) -> TrainingJob:
    """Return the job as it has to go on if its ranks were started again, by `mm train` or by torchrun: from the last
    complete checkpoint of its own run, whatever `--load` named at first. Every rank calls this; rank 0 looks.
    """
    found: list[str | None] = [None]
    if dist.get_rank() == 0 and run.belongs_to(_job_token()) and latest_checkpoint(run.path) is not None:
        found[0] = str(run.path)
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


def _continued(run: RunFolder, job: TrainingJob) -> Path | None:
    """The checkpoint of the run's own folder from which the job goes on; `None` if it starts another run."""
    load = expanded(job.flags.load) if job.flags.load else None
    if load is None or job.flags.finetune or is_hf_folder(load):
        return None
    return resolve_load(load) if load.resolve().is_relative_to(run.path.resolve()) else None
