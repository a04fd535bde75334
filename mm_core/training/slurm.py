"""SLURM: what its variables say of the machines of a job, as torchrun's variables and our own flags.

`srun mm train …` with one task a device makes each task a rank; with one task a machine and `--nproc-per-node N`
each task starts the ranks of its machine. An interactive shell or a batch script, where `mm train` is started
once, is neither. This file imports no torch.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mm_core.config import TrainFlags
from mm_core.config.environment import launched, read, whole_number
from mm_core.config.findings import clip
from mm_registry.errors import UserError

_MOST = 100_000  # machines; a list of more is a slip, and would fill the memory
_HOST = re.compile(r"(?:\[[^\[\]]*\]|[^,\[\]\s])+")
_HOSTS = re.compile(rf"{_HOST.pattern}(?:,{_HOST.pattern})*")
_BRACKETS = re.compile(r"\[([^\]]*)\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?", re.ASCII)
# slurm.h: SLURM_PENDING_STEP, EXTERN_CONT, BATCH_SCRIPT and INTERACTIVE_STEP count down from here. `salloc` runs its
# shell in the last one, with the number of tasks of the whole allocation.
_SPECIAL_STEPS = 0xFFFF_FFF0
_PORTS = range(10_000, 30_000)  # below what systems hand out by themselves
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")


@dataclass(frozen=True)
class SlurmTask:
    """This process as a task of an srun step.

    Attributes:
        task, tasks: number of this task, from 0, and how many there are.
        local_task, local_tasks: the same on its machine.
        node, nodes: number of its machine in the step, and how many there are.
        first_host: the machine of task 0.
        port: one that follows from the job and the step, so that two steps do not meet.
        job: `SLURM_JOB_ID`.
    """

    task: int
    tasks: int
    local_task: int
    local_tasks: int
    node: int
    nodes: int
    first_host: str
    port: int
    job: str


def expand_hosts(text: str, variable: str = "SLURM_STEP_NODELIST") -> list[str]:
    """Expand a list of machines: `node[01-03,07],gpu-a` is node01, node02, node03, node07, gpu-a.

    Raises:
        UserError: it is no such list.
    """
    hosts: list[str] = []
    try:
        if not _HOSTS.fullmatch(text):
            raise ValueError("a bracket or a name is missing")
        for part in _HOST.findall(text):
            pieces = _BRACKETS.split(part)
            choices = [_numbers(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
            if math.prod(map(len, choices)) > _MOST:
                raise ValueError(f"{part} would be more than {_MOST} machines")
            hosts += ["".join(words) for words in itertools.product(*choices)]
    except ValueError as error:
        raise UserError(
            f'{variable}="{clip(text)}" is no list of machines as SLURM writes it, such as node[01-04,07],gpu-a: {error}.'
        ) from None
    return hosts


def _numbers(text: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f'"{clip(part)}" is no number and no range such as 01-04')
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) < _MOST:
            raise ValueError(f"{part} does not go up, or too far")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def expand_counts(text: str, variable: str = "SLURM_STEP_TASKS_PER_NODE") -> list[int]:
    """Expand tasks a machine: `2(x3),1` is 2, 2, 2, 1.

    Raises:
        UserError: it is no such list.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if match is None or len(counts) + int(match[2] or 1) > _MOST:
            raise UserError(
                f'{variable}="{clip(text)}" does not say how many tasks each machine has, such as 2(x3),1.'
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def slurm_task(environ: Mapping[str, str] | None = None) -> SlurmTask | None:
    """Return what this process is in an srun step; None outside of one, and where the step has a single task.

    Raises:
        UserError: the variables contradict each other, or hold no numbers.
    """
    if read("SLURM_STEP_ID", environ) is None or read("SLURM_PROCID", environ) is None:
        return None  # a batch script has a number of tasks too, and is started once
    step = whole_number("SLURM_STEP_ID", 0, environ)
    total = "SLURM_STEP_NUM_TASKS" if read("SLURM_STEP_NUM_TASKS", environ) else "SLURM_NTASKS"
    tasks = whole_number(total, 1, environ)
    if step >= _SPECIAL_STEPS or tasks <= 1:
        return None
    task, node = whole_number("SLURM_PROCID", 0, environ), whole_number("SLURM_NODEID", 0, environ)
    if not 0 <= task < tasks:
        raise UserError(f"SLURM_PROCID={task} is outside {total}={tasks}; unset both outside of srun.")
    name, listed = _first_set(("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), environ)
    hosts = expand_hosts(listed, name) if listed else []
    nodes = whole_number(
        "SLURM_STEP_NUM_NODES", len(hosts) or whole_number("SLURM_NNODES", 1, environ), environ
    )
    if not 0 <= node < nodes:
        raise UserError(
            f"SLURM_NODEID={node} is outside the {nodes} machines of the srun step; unset it outside of srun."
        )
    name, counts = _first_set(("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"), environ)
    each = expand_counts(counts, name) if counts else []
    if sum(each) == tasks and node < len(each):
        local = each[node]
    else:  # the step has another shape than the allocation, which these variables are about
        local = whole_number("SLURM_NTASKS_PER_NODE", max(1, tasks // max(1, nodes)), environ)
    job = read("SLURM_JOB_ID", environ) or "0"
    number = int(job) if job.isascii() and job.isdigit() else 0
    return SlurmTask(
        task=task,
        tasks=tasks,
        local_task=whole_number("SLURM_LOCALID", 0, environ),
        local_tasks=local,
        node=node,
        nodes=nodes,
        first_host=hosts[0] if hosts else "",
        port=_PORTS[(number * 16 + step) % len(_PORTS)],
        job=job,
    )


def _first_set(names: Sequence[str], environ: Mapping[str, str] | None) -> tuple[str, str]:
    """The first variable that holds something, with its value; two empty texts if none does."""
    return next(((name, value) for name in names if (value := read(name, environ))), ("", ""))


def join_slurm(
    flags: TrainFlags, environ: Mapping[str, str] | None = None
) -> tuple[TrainFlags, dict[str, str]]:
    """Take this process's place from SLURM, where nothing else has said it: for a task that is a rank, the variables
    that torchrun would set; for a task that starts the ranks of its machine, the flags.

    MASTER_ADDR and MASTER_PORT win where they are set, and so do flags.

    Returns:
        The flags, and variables to set in the environment; none if a launcher did, or this is no srun step.

    Raises:
        UserError: the step and the flags do not fit together.
    """
    if launched(environ):
        return flags, {}
    task = slurm_task(environ)
    if task is None:
        return flags, {}
    address = flags.master_addr or read("MASTER_ADDR", environ) or task.first_host
    if not address:
        raise UserError(
            "srun did not say on which machines the step runs (SLURM_STEP_NODELIST); set MASTER_ADDR to the first one."
        )
    port = flags.master_port or whole_number("MASTER_PORT", task.port, environ)
    if task.tasks == task.nodes and (flags.nproc_per_node is not None or flags.elastic):
        return _machine(flags, task, address, port), {}
    if flags.elastic:
        raise UserError(
            f"--max-restarts and --rdzv-… start the ranks of a machine again, but this step has {task.local_tasks} tasks on "
            "this machine; use srun --ntasks-per-node=1 and --nproc-per-node."
        )
    if flags.nproc_per_node not in (None, task.local_tasks):
        raise UserError(
            f"--nproc-per-node {flags.nproc_per_node}: srun already started {task.local_tasks} tasks on this machine; "
            "leave the flag out, or use srun --ntasks-per-node=1."
        )
    # With --gpus-per-task each task sees its own device alone, which is then number 0.
    seen = [read(name, environ) for name in _VISIBLE]
    alone = any(value is not None and value.strip() and "," not in value for value in seen)
    return flags, {
        "RANK": str(task.task),
        "WORLD_SIZE": str(task.tasks),
        "LOCAL_RANK": "0" if alone else str(task.local_task),
        "LOCAL_WORLD_SIZE": str(task.local_tasks),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _machine(flags: TrainFlags, task: SlurmTask, address: str, port: int) -> TrainFlags:
    for name, value in (("nnodes", task.nodes), ("node_rank", task.node)):
        given = getattr(flags, name)
        if isinstance(given, int) and given != value:
            raise UserError(
                f"{flags.spelling(name)} {given}: this task is on machine {task.node} of the {task.nodes} of the srun step; "
                "leave the flag out under srun."
            )
    update: dict[str, object] = {"master_addr": address, "master_port": port}
    if not isinstance(flags.nnodes, str):
        update |= {"nnodes": task.nodes, "node_rank": task.node}
    if flags.elastic:
        update["rdzv_endpoint"] = flags.rdzv_endpoint or f"{address}:{port}"
        update["rdzv_id"] = flags.rdzv_id or task.job
    return flags.model_copy(update=update)
