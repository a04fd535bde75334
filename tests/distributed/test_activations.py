"""Recomputed and offloaded activations: the same gradients as without, less memory, and no more work than said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding.offload import Offloader
from mm_core.sharding.plan import bare_name
from mm_core.weights import materialize
from tests.distributed.harness import run_ranks
from tests.distributed.models import MODELS, TinyModel, force_offload

pytestmark = pytest.mark.timeout(180)

CHOICES: dict[str, dict[str, Any]] = {
    "full": {"recompute": "blocks"},
    "reentrant": {"recompute": "blocks", "use_reentrant": True},
    "selective": {"recompute": "blocks", "recompute_granularity": "selective"},
    "part": {"recompute": "parts"},
    "offload": {"offload": "blocks"},
    "offload-part": {"offload": "parts"},
    "full-offload": {"recompute": "blocks", "offload": "parts"},
    "reentrant-offload": {"recompute": "blocks", "use_reentrant": True, "offload": "blocks"},
    "selective-offload": {"recompute": "blocks", "recompute_granularity": "selective", "offload": "blocks"},
    "part-offload": {"recompute": "parts", "offload": "blocks"},
}


def fsdp2_of(tiny: TinyModel, choice: dict[str, Any], **more: Any) -> Fsdp2Config:
    fields = {key: value for key, value in choice.items() if key not in ("recompute", "offload")}
    for key, field in (("recompute", "recompute_modules"), ("offload", "offload_activations")):
        if key in choice:
            fields[field] = (f"predictor.{getattr(tiny, choice[key])}",)
    return Fsdp2Config(**fields, **more)


def gradients_of(name: str, choice: dict[str, Any], **more: Any) -> tuple[float, dict[str, Any], int]:
    """Loss, whole gradients and number of offloaded tensors of one global batch, on this rank."""
    tiny = MODELS[name]
    model = tiny.composite()
    model.fully_shard(None, fsdp2_of(tiny, choice, **more))
    materialize(model.predictor, "cpu", 0)
    offloader = force_offload(model)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loss, weight = tiny.loss(model.predictor, 0, rank, world)
    (loss / weight).backward()
    found = {}
    for parameter_name, parameter in model.predictor.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[bare_name(parameter_name)] = whole.numpy().copy()
    return loss.item(), found, offloader.copies


def all_choices(name: str, choices: list[str], **more: Any) -> dict[str, Any]:
    return {choice: gradients_of(name, CHOICES.get(choice, {}), **more) for choice in ["none", *choices]}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "world", "more"),
    [
        pytest.param("wan", 1, {}, id="wan-1"),
        pytest.param("wan", 2, {}, id="wan-2"),
        pytest.param("dense", 1, {}, id="dense-1"),
        pytest.param("dense", 2, {}, id="dense-2", marks=slow),
        pytest.param("moe", 2, {}, id="moe-2", marks=slow),
        pytest.param(
            "wan",
            2,
            {"reshard_after_forward": False, "num_to_forward_prefetch": 1},
            id="wan-2-gathered",
            marks=slow,
        ),
        pytest.param("wan", 2, {"param_dtype": "bf16", "reduce_dtype": "fp32"}, id="wan-2-bf16", marks=slow),
        pytest.param(
            "dense", 2, {"param_dtype": "bf16", "reduce_dtype": "fp32"}, id="dense-2-bf16", marks=slow
        ),
    ],
)
def test_gradients_are_those_of_no_choice_at_all(name, world, more):
    for results in run_ranks(all_choices, world, name, list(CHOICES), **more):
        loss, expected, copies = results.pop("none")
        assert copies == 0
        assert len(expected) > 10
        for choice, (its_loss, found, its_copies) in results.items():
            assert its_loss == loss, choice
            assert (its_copies > 0) == ("offload" in choice), choice
            assert found.keys() == expected.keys(), choice
            exact = "reentrant" not in choice  # which sums gradients in another order
            for parameter, grad in expected.items():
                tolerance = 0 if exact else (1e-2 if "param_dtype" in more else 1e-6)
                np.testing.assert_allclose(
                    found[parameter],
                    grad,
                    rtol=0,
                    atol=tolerance * abs(grad).max(),
                    err_msg=f"{choice} {parameter}",
                )


def test_gathered_parameters_of_units_inside_are_not_offloaded():
    """A block is offloaded whose own parts are units: their parameters are gathered while it runs."""

    def run() -> tuple[int, int, list[str]]:
        tiny = MODELS["wan"]
        model = tiny.composite()
        units = ("predictor.blocks.{*}", "predictor.blocks.{*}.ffn", "predictor.blocks.{*}.attn1")
        model.fully_shard(None, Fsdp2Config(sub_modules_to_wrap=units, offload_activations=units[:1]))
        materialize(model.predictor, "cpu", 0)
        offloader = force_offload(model)
        wrong: list[tuple[int, ...]] = []

        def send(entry: Any) -> None:
            gathered = [p for p in model.predictor.parameters() if not isinstance(p, DTensor)]
            here = {p.untyped_storage().data_ptr() for p in gathered}
            if entry.on_device.untyped_storage().data_ptr() in here:
                wrong.append(tuple(entry.on_device.shape))
            Offloader._send(offloader, entry)

        offloader._send = send  # type: ignore[method-assign]
        loss, weight = tiny.loss(model.predictor, 0, torch.distributed.get_rank(), 2)
        (loss / weight).backward()
        return (
            offloader.copies,
            len(wrong),
            [bare_name(name) for name, m in model.named_modules() if isinstance(m, FSDPModule)],
        )

    for copies, parameters, units in run_ranks(run, 2):
        assert copies > 0
        assert parameters == 0
        assert "predictor.blocks.0.ffn" in units


def test_a_recomputed_block_is_gathered_once_for_its_backward_pass():
    def run(recompute: bool) -> int:
        tiny = MODELS["wan"]
        model = tiny.composite()
        chosen = (f"predictor.{tiny.blocks}",)
        model.fully_shard(
            None, Fsdp2Config(recompute_modules=chosen if recompute else (), offload_activations=chosen)
        )
        materialize(model.predictor, "cpu", 0)
        force_offload(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss, weight = tiny.loss(model.predictor, 0, torch.distributed.get_rank(), 2)
            (loss / weight).backward()
        return sum("allgather" in event.name.lower() and "c10d" in event.name for event in profile.events())

    def both() -> tuple[int, int]:
        return run(True), run(False)

    for with_recompute, without in run_ranks(both, 2):
        assert with_recompute == without > 0


@pytest.mark.parametrize("name", ["wan", "moe"])
def test_units_inside_a_selectively_recomputed_module(name):
    """FSDP2 does other operations of its own there the second time: what it prefetched it does not gather again."""
    how: dict[str, Any] = {"num_to_forward_prefetch": 2, "num_to_backward_prefetch": 2}
    inside = {"align_fsdp_param_groups": True} if name == "wan" else {"expert_parallel_size": 2}
    _, expected, _ = run_ranks(gradients_of, 2, name, {}, **how, timeout=100)[0]
    choice = {"recompute": "blocks", "recompute_granularity": "selective"}
    _, got, _ = run_ranks(gradients_of, 2, name, choice, **how, **inside, timeout=100)[0]
    for key, gradient in expected.items():
        np.testing.assert_allclose(got[key], gradient, rtol=1e-4, atol=1e-6, err_msg=key)
