"""SLURM's variables, as real clusters set them, become torchrun's or our flags."""

from __future__ import annotations

import pytest

from mm_core.config import TrainFlags
from mm_core.training.slurm import SlurmTask, expand_counts, expand_hosts, join_slurm, slurm_task
from mm_registry.errors import UserError

#: srun of a batch job: 2 machines, 4 devices each, one task a device; task 5 (SLURM 23.02).
TASK_A_DEVICE = {
    "SLURM_JOB_ID": "4711", "SLURM_JOBID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_NODELIST": "gpu[07-08]",
}  # fmt: skip
#: The same with one task a machine.
TASK_A_MACHINE = {
    **TASK_A_DEVICE, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
#: Machines of different sizes, tasks 3, 3 and 1.
UNEVEN = {
    **TASK_A_DEVICE, "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "a1,b[2-3]",
}  # fmt: skip
#: A step of one machine in an allocation of two: SLURM_NNODES and friends are of the allocation.
PART = {
    **TASK_A_DEVICE, "SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_ID": "3",
}  # fmt: skip
#: An old SLURM says little.
OLD = {
    name: TASK_A_DEVICE[name]
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS",
                 "SLURM_NNODES", "SLURM_JOB_NODELIST")
}  # fmt: skip

#: A script of sbatch: the first machine runs it, once, whatever the number of tasks.
BATCH = {
    "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
#: The shell of salloc, before and since it is a step of its own (LaunchParameters=use_interactive_step).
SALLOC = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}
INTERACTIVE = {
    **BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu07",
}  # fmt: skip
#: srun --ntasks=1 --pty bash, in an allocation with several tasks.
PTY = {**TASK_A_DEVICE, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-04,07],gpu-a", ["node01", "node02", "node03", "node04", "node07", "gpu-a"]),
        ("a,b,c", ["a", "b", "c"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]-ib.org", ["n098-ib.org", "n099-ib.org", "n100-ib.org", "n101-ib.org"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
    ],
)  # fmt: skip
def test_lists_of_machines(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    "text",
    ["", "n[1-", "n[a-b]", "n[1-2", "n1-2]", "a,,b", "a,", "n[[1]]", "n[4-1]", "a,n[4-1]", "n[]", "n[1-9999999999]",
     "n[1-999][1-999]", "a b"],
)  # fmt: skip
def test_what_is_no_list_of_machines(text: str) -> None:
    with pytest.raises(UserError, match=r'^X="[^\n]*" is no list of machines[^\n]*\.$') as caught:
        expand_hosts(text, "X")
    assert caught.value.exit_code == 2


def test_counts_of_tasks() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]
    for wrong in ("2(y3)", "", "2(x9999999999)"):
        with pytest.raises(UserError, match=r"SLURM_STEP_TASKS_PER_NODE=.* how many tasks"):
            expand_counts(wrong)


def test_one_task_a_device() -> None:
    flags, variables = join_slurm(TrainFlags(), TASK_A_DEVICE)
    port = variables.pop("MASTER_PORT")
    assert 10_000 <= int(port) < 30_000
    assert variables == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07",
    }  # fmt: skip
    assert flags == TrainFlags()
    other = join_slurm(TrainFlags(), {**TASK_A_DEVICE, "SLURM_STEP_ID": "1"})[1]
    assert other["MASTER_PORT"] != port, "two steps of a job may run at once"
    assert join_slurm(TrainFlags(nproc_per_node=4), TASK_A_DEVICE)[1]["RANK"] == "5", "the number agrees"


def test_what_is_set_wins() -> None:
    given = {**TASK_A_DEVICE, "MASTER_ADDR": "10.1.1.7", "MASTER_PORT": "4242"}
    variables = join_slurm(TrainFlags(), given)[1]
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.1.1.7", "4242")
    variables = join_slurm(TrainFlags(master_addr="head", master_port=5), given)[1]
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("head", "5")
    # torchrun inside a task of srun
    assert join_slurm(TrainFlags(), {**TASK_A_DEVICE, "RANK": "0", "WORLD_SIZE": "2"}) == (TrainFlags(), {})


def test_a_task_that_sees_its_own_device_alone() -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"):
        assert join_slurm(TrainFlags(), {**TASK_A_DEVICE, name: "0"})[1]["LOCAL_RANK"] == "0"
        assert join_slurm(TrainFlags(), {**TASK_A_DEVICE, name: "0,1,2,3"})[1]["LOCAL_RANK"] == "1"


def test_one_task_a_machine() -> None:
    flags, variables = join_slurm(TrainFlags(nproc_per_node=4), TASK_A_MACHINE)
    assert variables == {}
    assert (flags.nnodes, flags.node_rank, flags.nproc_per_node, flags.master_addr) == (2, 1, 4, "gpu07")
    assert flags.master_port == int(join_slurm(TrainFlags(), TASK_A_DEVICE)[1]["MASTER_PORT"])
    with pytest.raises(UserError, match=r"--nnodes 4: this task is on machine 1 of the 2"):
        join_slurm(TrainFlags(nproc_per_node=4, nnodes=4), TASK_A_MACHINE)
    # Without a number of ranks, each task is one.
    assert join_slurm(TrainFlags(), TASK_A_MACHINE)[1]["WORLD_SIZE"] == "2"


def test_an_elastic_job_has_one_task_a_machine() -> None:
    wanted = TrainFlags(nproc_per_node=4, max_restarts=3, save="run")
    flags = join_slurm(wanted, TASK_A_MACHINE)[0]
    assert (flags.rdzv_id, flags.rdzv_endpoint) == ("4711", f"gpu07:{flags.master_port}")
    assert join_slurm(TrainFlags(nproc_per_node=4, nnodes="1:2"), TASK_A_MACHINE)[0].nnodes == "1:2"
    with pytest.raises(UserError, match="--ntasks-per-node=1"):
        join_slurm(wanted, TASK_A_DEVICE)


def test_other_shapes() -> None:
    uneven, part, old = slurm_task(UNEVEN), slurm_task(PART), slurm_task(OLD)
    assert uneven is not None
    assert (uneven.local_tasks, uneven.nodes, uneven.first_host) == (1, 3, "a1")
    assert part is not None
    assert (part.tasks, part.local_tasks, part.nodes, part.first_host) == (2, 2, 1, "gpu08")
    assert old == SlurmTask(5, 8, 1, 4, 1, 2, "gpu07", old.port if old else 0, "4711")


@pytest.mark.parametrize(
    "environ", [{}, BATCH, SALLOC, INTERACTIVE, PTY], ids=["none", "sbatch", "salloc", "shell", "pty"]
)
def test_started_once_it_is_no_task(environ: dict[str, str]) -> None:
    flags = TrainFlags(nproc_per_node=2)
    assert slurm_task(environ) is None
    assert join_slurm(flags, environ) == (flags, {})


def test_contradictions() -> None:
    with pytest.raises(UserError, match=r"SLURM_PROCID=8 is outside SLURM_STEP_NUM_TASKS=8"):
        slurm_task({**TASK_A_DEVICE, "SLURM_PROCID": "8"})
    with pytest.raises(UserError, match=r"SLURM_NODEID=2 is outside the 2 machines"):
        slurm_task({**TASK_A_DEVICE, "SLURM_NODEID": "2"})
    with pytest.raises(UserError, match=r"SLURM_JOB_NODELIST=\"gpu\[07\" is no list"):
        slurm_task({**OLD, "SLURM_JOB_NODELIST": "gpu[07"})
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        slurm_task({**TASK_A_DEVICE, "SLURM_LOCALID": "one"})
    with pytest.raises(UserError, match=r"--nproc-per-node 2: srun already started 4 tasks"):
        join_slurm(TrainFlags(nproc_per_node=2), TASK_A_DEVICE)
