"""Ranks that are started again: torch's elastic agent runs in the command's process, after it has checked the job.

    mm train … --nproc-per-node 8 --max-restarts 3
    mm train … --nnodes 1:4 --rdzv-endpoint head:29400 --rdzv-id job --nproc-per-node 8 --max-restarts 3

The agent starts all ranks of its machine. When one fails, all of them start again, on every machine, and go on from
the last complete checkpoint of `--save`. A mistake of the user's is not tried again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from mm_core.config import TrainFlags
from mm_core.config.document import expanded
from mm_core.config.flags import rendezvous_settings, split_endpoint
from mm_core.config.parallel import ParallelSizes
from mm_core.training.failures import describe_exit, keep_output
from mm_core.training.launch import EXIT_USER, PARENT, shared_threads
from mm_core.training.meeting import LaunchError
from mm_core.training.stop import EXIT_TERMINATED
from mm_core.weights.layout import latest_checkpoint

log = logging.getLogger(__name__)

_PORT = 29400  # torchrun's
_STOPPED = (EXIT_TERMINATED, -signal.SIGTERM)


def run_elastic(flags: TrainFlags, argv: Sequence[str]) -> int:
    """Start the ranks of this machine, again after a failure, and return the exit code of the job.

    Args:
        flags: checked.
        argv: the command line after `mm train`, for the ranks.

    Raises:
        LaunchError: the machines did not find each other.
    """
    job = flags.rdzv_id or uuid.uuid4().hex
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(console)
    log.setLevel(logging.INFO)
    for name in list(logging.root.manager.loggerDict):  # torch gives each of its modules a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what it would say is said below
    variables = {PARENT: str(os.getpid()), "MM_JOB": job, **shared_threads(flags.nproc_per_node or 1)}
    # The agent would kill ranks that take longer to save; and only signals that it need not know of are its own.
    os.environ.update(variables, TORCHELASTIC_SIGNALS_TO_HANDLE="SIGHUP,SIGQUIT")
    try:
        _warn_of_batches(flags)
        with tempfile.TemporaryDirectory(prefix="mm-train-", ignore_cleanup_errors=True) as outputs:
            return _run(flags, _rendezvous(flags, job), argv, outputs)
    except RendezvousError as error:
        raise LaunchError(_not_met(flags, error)) from error
    finally:
        log.removeHandler(console)


def _run(flags: TrainFlags, handler: RendezvousHandler, argv: Sequence[str], outputs: str) -> int:
    agent = _Agent(_spec(flags, argv, handler), _logs(flags, outputs), flags)
    before = signal.signal(signal.SIGTERM, agent.stop)
    try:
        result: RunResult | None = agent.run()
    except SignalException as error:  # the terminal was closed; the ranks have ended
        return 128 + error.sigval
    finally:
        signal.signal(signal.SIGTERM, before)
        handler.shutdown()
    if result is not None and result.is_failed():
        return agent.exit_code
    return EXIT_TERMINATED if agent.stopped else 0


class _Agent(LocalElasticAgent):
    """The agent, with what it does about a failure said, and not done for a mistake of the user's.

    A failed rank is looked at where torch's documentation has subclasses look, in `_monitor_workers`.
    """

    _remaining_restarts: int  # torch's; nothing public takes a restart back

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, flags: TrainFlags) -> None:
        super().__init__(spec, logs)
        self.stopped = False
        self.exit_code = 1
        self._flags = flags
        self._pids: dict[int, Any] = {}

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Pass SIGTERM on: the ranks save once, and leave."""
        self.stopped = True
        if not self._pids:
            raise SystemExit(EXIT_TERMINATED)  # between two starts
        for pid in self._pids.values():
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # The store of a rendezvous is its own, and tells this start from the others on every machine alike; a count of
        # restarts does not, because machines that only hear of a failure do not count it.
        store = worker_group.store
        os.environ["MM_ATTEMPT"] = store.compare_set("mm-attempt", "", uuid.uuid4().hex).decode()
        self._pids = super()._start_workers(worker_group)
        return self._pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is not WorkerState.FAILED:
            return result
        # A rank that a signal ended did not follow another, though the others' words may be older than the look at it.
        failures = sorted(
            result.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp)
        )
        codes = [failure.exitcode for _, failure in failures]
        self._pids = {}
        if EXIT_TERMINATED in codes and all(code in _STOPPED for code in codes):
            if not self.stopped and worker_group.spec.rdzv_handler.num_nodes_waiting() > 0:
                return RunResult(
                    state=WorkerState.HEALTHY
                )  # for a machine that joins; the agent looks itself
            self.stopped = True  # the ranks agreed to, here or on another machine
            ranks = [worker.global_rank for worker in worker_group.workers]
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))
        left = self._remaining_restarts
        if self.stopped or EXIT_USER in codes or 130 in codes:
            left = self._remaining_restarts = 0
            self.exit_code = EXIT_USER if EXIT_USER in codes else 1
            if self.stopped and all(code in _STOPPED for code in codes):
                self.exit_code = EXIT_TERMINATED  # before they had anything to save
                return result
        self._tell(failures, left)
        return result

    def _tell(self, failures: Sequence[tuple[int, ProcessFailure]], left: int) -> None:
        rank, first = failures[0]
        log.error("rank %d ended with %s", rank, describe_exit(first.exitcode))
        run = expanded(self._flags.save) if self._flags.save else None
        for number, failure in failures:
            self._keep(number, failure, run)
        if not left:
            return
        total = self._flags.max_restarts or 0
        checkpoint = latest_checkpoint(run) if run is not None and run.is_dir() else None
        begin = (
            f"from {checkpoint}"
            if checkpoint is not None
            else "from its beginning, for there is no checkpoint yet"
        )
        log.warning("restart %d of %d: the job goes on %s", total - left + 1, total, begin)

    def _keep(self, rank: int, failure: ProcessFailure, run: Path | None) -> None:
        """Keep what a rank printed that died before it wrote to its log."""
        if failure.exitcode in (EXIT_USER, *_STOPPED) or failure.local_rank == 0:
            return
        logs = run / "logs" if run is not None else None
        folder = Path(
            failure.error_file
        ).parent  # of this rank and start; torch keeps its output beside the error
        for name in ("stdout.log", "stderr.log"):
            if (folder / name).is_file():
                with (folder / name).open("rb") as output:
                    kept = keep_output(output, logs, rank)
                if kept is not None:
                    log.error("what rank %d printed is in %s", rank, kept)


def _warn_of_batches(flags: TrainFlags) -> None:
    """Say for which numbers of machines the global batch cannot be dealt out: the job would end there."""
    least, most = flags.machines
    ranks = flags.nproc_per_node or 1
    together = ParallelSizes.of(flags).together
    odd = [
        str(number)
        for number in range(least, most + 1)
        if number * ranks % together or flags.check_batch(number * ranks // together) is not None
    ]
    if odd and most > least:
        log.warning(
            "--global-batch-size %d cannot be dealt out on %s machines of %d ranks: if so many are there, the job ends",
            flags.global_batch_size, ", ".join(odd), ranks,
        )  # fmt: skip


def _spec(flags: TrainFlags, argv: Sequence[str], handler: Any) -> WorkerSpec:
    return WorkerSpec(
        role="rank",
        local_world_size=flags.nproc_per_node or 1,
        entrypoint=sys.executable,
        args=("-m", "mm_core", "train", *argv),
        rdzv_handler=handler,
        max_restarts=flags.max_restarts or 0,
        monitor_interval=flags.monitor_interval,
    )


def _logs(flags: TrainFlags, outputs: str) -> DefaultLogsSpecs:
    """The first rank of a machine prints to the console; the others into files, until they have a log."""
    others = range(1, flags.nproc_per_node or 1)
    return DefaultLogsSpecs(outputs, redirects=dict.fromkeys(others, Std.ALL))


def _rendezvous(flags: TrainFlags, job: str) -> RendezvousHandler:
    least, most = flags.machines
    settings: dict[str, Any] = dict(rendezvous_settings(flags.rdzv_conf or "")[0])
    seconds = 60 * flags.distributed_timeout_minutes
    settings.setdefault("join_timeout", settings.get("timeout", seconds))
    host, port = split_endpoint(flags.rdzv_endpoint or "")
    host, port = host or flags.master_addr, port or flags.master_port or _PORT
    endpoint = f"[{host}]:{port}" if ":" in (host or "") else f"{host}:{port}"
    if host is None or most == 1:
        endpoint, settings["is_host"] = "localhost:0", True
    parameters = RendezvousParameters(
        "c10d", endpoint, job, least, most, local_addr="localhost" if most == 1 else None, **settings
    )
    return get_rendezvous_handler(parameters)


def _not_met(flags: TrainFlags, error: Exception) -> str:
    where = flags.rdzv_endpoint or flags.master_addr or "this machine"
    if isinstance(error, RendezvousClosedError):
        return (
            f"--rdzv-id {flags.rdzv_id}: the job has ended on another machine; look at what that one printed."
        )
    least, most = flags.machines
    machines = f"{least} to {most} machines" if most > least else f"{most} machine{'s' if most > 1 else ''}"
    return (
        f"--rdzv-endpoint {where}: the {machines} of the job did not meet there ({type(error).__name__}: {error}); start the "
        "same command on each, with the same --rdzv-endpoint and --rdzv-id, and see that the port is open between them."
    )
