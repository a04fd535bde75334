"""A job and the machine it starts on: ranks against cores and devices, the backend, environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_core.config import parse_train_flags
from mm_core.config.machine import check_surroundings, find_devices


def told(
    line: str, folder: Path, environ: dict[str, str] | None = None, *, cores: int = 2, to_run: bool = True
) -> list[str]:
    flags = parse_train_flags(line.split())
    found = check_surroundings(flags, to_run=to_run, environ=environ or {}, folder=folder, cores=cores)
    return [str(finding) for finding in found]


def devices(folder: Path, *names: str) -> Path:
    for name in (*names, "null", "nvidia-uvm", "nvidiactl", "davinci_manager"):
        (folder / name).touch()
    return folder


def test_ranks_against_cores(tmp_path: Path) -> None:
    assert told("--nproc-per-node 4", tmp_path) == []
    assert told("--nproc-per-node 5", tmp_path) == [
        "--nproc-per-node warning: 5 ranks on a machine with 2 cores and no accelerator will take turns, and each waits "
        "for the others. Use 2 for speed"
    ]
    assert told("--nproc_per_node 17", tmp_path) == [
        "--nproc_per_node error: 17 ranks are too many for a machine with 2 cores and no accelerator: each is a process "
        "that needs a core. Use at most 16"
    ]
    assert told("--nproc-per-node 1000", tmp_path, to_run=False) == [], "it may be meant for another machine"
    assert told("", tmp_path, cores=1) == []


def test_ranks_against_devices(tmp_path: Path) -> None:
    folder = devices(tmp_path, "davinci0", "davinci1", "davinci2", "davinci3")
    assert told("--nproc-per-node 4", folder, cores=1) == []
    assert told("--nproc-per-node 8", folder) == [
        "--nproc-per-node warning: 8 ranks, but this machine shows 4 devices. Use 4, one rank a device"
    ]
    assert told("--nproc-per-node 2", folder, {"ASCEND_RT_VISIBLE_DEVICES": "1"}) == [
        "--nproc-per-node warning: 2 ranks, but this machine shows 1 device. Use 1, one rank a device"
    ]


@pytest.mark.parametrize(
    ("environ", "found"),
    [({}, ("cuda", 2)), ({"CUDA_VISIBLE_DEVICES": "0"}, ("cuda", 1)), ({"CUDA_VISIBLE_DEVICES": ""}, ("npu", 1)),
     ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, ("cuda", 2)), ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, ("cuda", 1)),
     ({"CUDA_VISIBLE_DEVICES": "1", "ASCEND_RT_VISIBLE_DEVICES": "0"}, ("cuda", 1)),
     ({"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}, ("cuda", 2)), ({"MM_DEVICE": "cpu"}, ("cpu", 0)),
     ({"MM_DEVICE": "cuda"}, ("cuda", 2)), ({"MM_DEVICE": "npu"}, ("npu", 1)),
     ({"MM_DEVICE": "npu", "ASCEND_RT_VISIBLE_DEVICES": ""}, ("npu", 0))],
)  # fmt: skip
def test_devices_are_counted_without_torch(
    tmp_path: Path, environ: dict[str, str], found: tuple[str, int]
) -> None:
    assert find_devices(environ, devices(tmp_path, "nvidia0", "nvidia1", "davinci0")) == found
    assert find_devices({}, tmp_path / "none") == ("cpu", 0)


def test_a_backend_of_accelerators_on_a_cpu_is_said(tmp_path: Path) -> None:
    assert told("--distributed-backend nccl", tmp_path) == [
        '--distributed-backend note: "nccl" is for accelerators; this process computes on the CPU and uses gloo'
    ]
    assert told("--distributed-backend gloo", tmp_path) == []
    assert told("--distributed-backend nccl", devices(tmp_path, "nvidia0")) == []
    assert told("--distributed-backend hccl", tmp_path) == [
        '--distributed-backend note: "hccl" is another maker\'s; nccl is used on this cuda device'
    ]


def test_a_misspelt_backend_is_an_error_wherever_the_job_will_run(tmp_path: Path) -> None:
    (found,) = told("--distributed-backend ncll", tmp_path, to_run=False)
    assert found.startswith(
        '--distributed-backend error: "ncll": "ncll" is no backend that training can use (did you mean'
    )
    (found,) = told("--distributed-backend npu:hccl", devices(tmp_path, "nvidia0"))
    assert '"npu:hccl" has nothing for the cuda device' in found
    assert told("--distributed-backend npu:hccl", tmp_path, {"MM_DEVICE": "npu"}) == []


def test_variables_count_only_where_they_matter(tmp_path: Path) -> None:
    classic = {"NON_MEGATRON": "true", "MULTI_STREAM_MEMORY_REUSE": "2", "CUDA_DEVICE_MAX_CONNECTIONS": "2"}
    assert told("", tmp_path, classic) == []
    wrong = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "MM_DEVICE": "gpu"}
    found = told("", tmp_path, wrong, to_run=False)
    assert [line.split(":")[0] for line in found] == [
        "MM_DEVICE error",
        "CUDA_DEVICE_MAX_CONNECTIONS warning",
    ]
