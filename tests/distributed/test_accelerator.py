"""The device of a process and its process group: alone, under a launcher, and what is wrong with either."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mm_core.accelerator import Accelerator, destroy_process_group, dtype_name, parse_dtype
from mm_registry.errors import UserError
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.timeout(60)
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _alone(environment: dict[str, str]) -> tuple[int, int, str]:
    dist.destroy_process_group()
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(environment)
    accelerator = Accelerator.current()
    accelerator.init_process_group(timeout_minutes=0.5)
    accelerator.init_process_group()  # a second call changes nothing
    value = torch.ones(1)
    dist.all_reduce(value)
    objects = [None] * dist.get_world_size()
    dist.all_gather_object(objects, dist.get_rank())
    result = int(value.item()), len(objects), dist.get_backend()
    destroy_process_group()
    return result


def test_a_process_without_launcher_is_a_group_of_one():
    assert run_ranks(_alone, 1, {}) == [(1, 1, "gloo")]


def test_a_launchers_variables_are_used():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def joined() -> tuple[int, int, str]:
        rank = str(dist.get_rank())
        return _alone({"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})

    assert run_ranks(joined, 2) == [(2, 2, "gloo")] * 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "has RANK but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK=2 is outside WORLD_SIZE=2",
        ),
        (
            {"RANK": "zero", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            'RANK is "zero", not a whole number',
        ),
    ],
)
def test_wrong_variables_are_user_errors(environment, message):
    def run() -> str:
        with pytest.raises(UserError) as caught:
            _alone(environment)
        return str(caught.value)

    assert message in run_ranks(run, 1)[0]


@pytest.mark.parametrize("backend", ["gloo", "nccl", "cpu:gloo", "hccl", "cpu:gloo,npu:hccl"])
def test_the_spellings_of_the_backend_flag_mean_gloo_on_a_cpu(backend):
    def run() -> str:
        dist.destroy_process_group()
        for name in LAUNCHER:
            os.environ.pop(name, None)
        Accelerator("cpu").init_process_group(backend)
        return dist.get_backend()

    assert run_ranks(run, 1) == ["gloo"]


@pytest.mark.parametrize(("before", "after"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_deterministic_forces_kernels_and_cublas_workspaces(before, after):
    def run() -> tuple[bool, bool, str | None]:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        if before is not None:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = before
        start = torch.are_deterministic_algorithms_enabled()
        Accelerator("cpu").deterministic()
        return start, torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]

    assert run_ranks(run, 1) == [(False, True, after)]


def test_an_unknown_backend_is_a_user_error():
    with pytest.raises(UserError, match='--distributed-backend "ncll"'):
        Accelerator("cpu").init_process_group("ncll")


def test_a_requested_device_that_is_missing_says_why():
    with pytest.raises(UserError, match='"tpu" is no device type; use one of cuda, npu, cpu'):
        Accelerator.current("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch finds no CUDA device"):
            Accelerator.current("cuda")
    with pytest.raises(UserError, match="torch_npu is not installed"):
        Accelerator.current("npu")


@pytest.mark.parametrize("requested", ["npu", "cpu", None])
def test_a_broken_torch_npu_is_told_whatever_the_device(monkeypatch, tmp_path: Path, requested):
    """As it fails where CANN is missing: diffusers and transformers import it on every machine that has it."""
    (tmp_path / "torch_npu.py").write_text('raise ImportError("libhccl.so: cannot open shared object file")')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"ImportError: libhccl\.so.*install the CANN.*pip uninstall torch-npu"
    ):
        Accelerator.current(requested)


def test_a_process_that_sees_one_device_uses_it(monkeypatch):
    """A scheduler can give each process its own: then the local rank says nothing about the index."""
    assert str(Accelerator("cuda", 3).device) == "cuda:3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert str(Accelerator("cuda", 3).device) == "cuda:0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert str(Accelerator("cuda", 1).device) == "cuda:1"


def test_a_cpu():
    cpu = Accelerator.current("cpu")
    assert (cpu.device, cpu.backend, cpu.has_pinned_memory) == (torch.device("cpu"), "gloo", False)
    assert 50e6 < cpu.max_memory_bytes() < 100e9
    assert all(cpu.supports(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16))
    assert cpu.new_stream() is cpu.current_stream() is cpu.new_event() is None
    with cpu.stream(None):
        host = cpu.pinned_like(torch.empty(2, 3).t())
    assert (host.shape, host.stride(), host.is_pinned()) == ((3, 2), (1, 3), False)
    assert not cpu.forces_sum_reduction
    assert Accelerator("npu").forces_sum_reduction
    cpu.check_processes(1000)  # they take turns
    cpu.synchronize()
    cpu.seed_all(2**63 + 5)
    first = torch.rand(2)
    cpu.seed_all(2**63 + 5)
    assert torch.equal(torch.rand(2), first)


def test_dtypes():
    assert parse_dtype("bf16") is parse_dtype("torch.bfloat16") is torch.bfloat16
    assert dtype_name(torch.float32) == "fp32"
    with pytest.raises(UserError, match='"bf15" is no dtype'):
        parse_dtype("bf15")
