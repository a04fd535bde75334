"""The pretend NPU itself, `Accelerator` on it, and FSDP2: what tells an NPU apart from a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

# The device is compiled first, which takes a minute.
pytestmark = pytest.mark.slow

Run = Callable[..., Any]
FULL = "cpu:gloo,npu:hccl"


@pytest.fixture(scope="module")
def device(run_case: Run) -> dict[str, Any]:
    return run_case("the_device")


def test_it_is_found_and_drives_its_streams(device: dict[str, Any]) -> None:
    assert device["accelerator"] == ["npu", "npu:0", FULL]
    assert device["streams"] == [True, True]
    # An event of a second stream, and the first one waiting for it.
    assert device["asked"]["stream 1 records an event"] == 1
    assert device["asked"]["stream 0 waits for stream 1"] == 1
    assert device["asked"]["memory is kept for stream 1"] == 1


def test_its_memory_is_counted(device: dict[str, Any]) -> None:
    assert device["memory"] == [4000, 4000, 8000], "1000 floats, a copy that went, and the peak of both"


def test_host_memory_is_page_locked(device: dict[str, Any]) -> None:
    assert device["pinned"] == [True, [1, 25], 500.0]
    assert device["copied"]["copy device to pinned"] == 2000


def test_its_generator_is_its_own_and_saved(device: dict[str, Any]) -> None:
    assert device["drawn_again"] is True


def test_it_has_bf16_and_no_float64(device: dict[str, Any]) -> None:
    assert device["supports"] == [True, True, False]
    assert device["float64"] == "the pretend NPU has no float64"


def test_each_rank_has_its_own_device_even_without_autoload(run_case: Run) -> None:
    assert run_case("second_device") == ["npu:0", "npu:1"]
    assert run_case("second_device", TORCH_DEVICE_BACKEND_AUTOLOAD="0") == ["npu:0", "npu:1"]


def test_two_ranks_on_one_device_are_refused(run_case: Run) -> None:
    """Three ranks on two devices, and two that see the same single one."""
    message = run_case("group_of", 3)
    assert (
        "3 processes on this machine, but it shows 2 npu devices: two processes cannot share one" in message
    )
    message = run_case("group_of", 2, ASCEND_RT_VISIBLE_DEVICES="1")
    assert "Ranks 0, 1 would share npu device 1 of" in message
    assert run_case("group_of", 2, ASCEND_RT_VISIBLE_DEVICES="0,1") == ""


@pytest.mark.parametrize("backend", [
    "npu:hccl,cpu:gloo", pytest.param(None, marks=pytest.mark.slow), pytest.param("nccl", marks=pytest.mark.slow),
    pytest.param("cpu:gloo,npu:hccl", marks=pytest.mark.slow), pytest.param("npu:nccl", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_backends_spellings_move_tensors_of_both_devices(run_case: Run, backend: str | None) -> None:
    first, second = run_case("collectives", backend)
    refused = ["Cannot use ReduceOp.AVG with HCCL", "Cannot use ReduceOp.PREMUL_SUM with HCCL"]
    assert first == [3.0, 2.0, [0.0, 1.0], 21.0, [0.0, 2.0], [0, 1], refused]
    assert second == [3.0, 2.0, [0.0, 1.0], 41.0, [1.0, 3.0], [0, 1], refused]


@pytest.mark.parametrize(("factor", "operation"), [(None, "AVG"), (3.0, "PREMUL_SUM")])
def test_fsdp2_needs_the_forced_sum(run_case: Run, factor: float | None, operation: str) -> None:
    assert run_case("plain_fully_shard", False, factor) == [f"Cannot use ReduceOp.{operation} with HCCL"] * 2
    assert run_case("plain_fully_shard", True, factor) == ["", ""]


# -- training: as on the CPU


@pytest.fixture(scope="module")
def on_cpu(run_case: Run) -> dict[str, Any]:
    return run_case("train", 1, {}, device="cpu")[0]


def trained(run_case: Run, on_cpu: dict[str, Any], world: int, tolerance: float, **fsdp2: Any) -> list[Any]:
    """Train on the pretend NPU; losses and norms must be the CPU's. Return what each rank's device was asked."""
    ranks = run_case("train", world, fsdp2)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(on_cpu["losses"], rel=tolerance)
        assert rank["norms"] == pytest.approx(on_cpu["norms"], rel=tolerance)
        assert rank["losses"] != [], "it trained"
    return ranks


def test_fsdp2_on_two_ranks(run_case: Run, on_cpu: dict[str, Any]) -> None:
    ranks = trained(run_case, on_cpu, 2, 1e-5)
    for index, rank in enumerate(ranks):
        assert rank["peaks"][index] > 100_000, "on this rank's device"
        assert rank["peaks"][1 - index] == 0, "and on no other"
        asked = rank["asked"]
        assert asked["reduce_scatter_tensor SUM"] == 15, "root and four units, three steps"
        assert asked["allgather_into_tensor"] > 15
        # FSDP2 gathers beside the computation: on other streams than the default one, which waits for them.
        assert asked["stream 2 records an event"] > 0
        assert asked["stream 0 waits for stream 2"] > 0


@pytest.mark.slow
def test_fsdp2_in_bf16(run_case: Run, on_cpu: dict[str, Any]) -> None:
    ranks = trained(run_case, on_cpu, 2, 2e-2, param_dtype="bf16", reduce_dtype="fp32")
    assert ranks[0]["losses"] != on_cpu["losses"], "it did compute in bf16"


@pytest.mark.slow
@pytest.mark.parametrize(("world", "fsdp2", "asked"), [
    (2, {"sharding_size": 1}, "allreduce SUM"),
    (2, {"recompute_modules": ["predictor.blocks.{*}"], "num_to_forward_prefetch": 1}, "allgather_into_tensor"),
    (2, {"reshard_after_forward": False}, "reduce_scatter_tensor SUM"),
])  # fmt: skip
def test_other_plans(
    run_case: Run, on_cpu: dict[str, Any], world: int, fsdp2: dict[str, Any], asked: str
) -> None:
    ranks = trained(run_case, on_cpu, world, 1e-5, **fsdp2)
    assert ranks[0]["asked"][asked] > 6


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [True, False])
def test_parameters_on_the_host(run_case: Run, on_cpu: dict[str, Any], pinned: bool) -> None:
    """The gradient's sum is made on the device, its norm over the gloo side of the group."""
    kept = trained(run_case, on_cpu, 2, 1e-5)
    ranks = trained(run_case, on_cpu, 2, 1e-5, offload_to_cpu=True, pin_memory=pinned)
    place = "pinned" if pinned else "host"
    assert ranks[0]["copied"][f"copy {place} to device"] > 500_000, "parameters, each time they are gathered"
    assert ranks[0]["peaks"][0] < kept[0]["peaks"][0]


@pytest.mark.slow
def test_activations_wait_on_the_host(run_case: Run) -> None:
    plain = run_case("train", 1, {}, 32)[0]
    offloaded = run_case("train", 1, {"offload_activations": ["predictor.blocks.{*}"]}, 32)[0]
    assert offloaded["losses"] == plain["losses"]
    assert offloaded["copied"]["copy device to pinned"] > offloaded["copied"]["copy pinned to device"] > 1e7
    assert offloaded["peaks"][0] < 0.8 * plain["peaks"][0]
    # Copies run on two streams of their own, and the computation waits for those that come back.
    assert offloaded["asked"]["stream 0 waits for stream 2"] > 0
    assert offloaded["asked"]["stream 1 waits for stream 0"] > 0


@pytest.mark.slow
def test_recomputation_saves_memory_of_the_device(run_case: Run) -> None:
    plain = run_case("train", 1, {}, 32)[0]
    again = run_case("train", 1, {"recompute_modules": ["predictor.blocks.{*}"]}, 32)[0]
    assert again["losses"] == plain["losses"]
    assert again["peaks"][0] < 0.7 * plain["peaks"][0]
