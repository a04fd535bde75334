"""Several micro batches a step, clipping without waiting for the device, parameters on several meshes: all as in one
process.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mm_core.accelerator import Accelerator
from mm_core.config import load_training_job, parse_train_flags
from mm_core.data import build_dataset
from mm_core.observe.callback import BaseCallback, RunContext, StepRecord
from mm_core.training.gradients import scale_and_clip
from mm_core.training.optimizer import ShardedAdamW
from mm_core.training.step import GradientExchange, NonFiniteLossError
from mm_core.training.trainer import Trainer
from mm_core.weights.tensors import whole_tensor
from tests.distributed.harness import run_ranks
from tests.distributed.test_participation import Recorder, whole
from tests.distributed.tiny import Composite, loss_of, optimizer_of, sharded, whole_tensors
from tests.e2e.conftest import ROOT, TINY

pytestmark = pytest.mark.timeout(180)


# -- when gradients are exchanged ---------------------------------------------------------------------------------------


def accumulated(defer: bool, **fsdp2: Any) -> tuple[dict[str, Any], list[int], str]:
    """Weights after two steps of three micro batches, and the all-reduces in each micro batch of the last one."""
    model: Composite = sharded(**fsdp2)
    optimizer = optimizer_of(model)
    exchange = GradientExchange([model.predictor], model.device_mesh, 3)
    counts: list[int] = []
    for step in range(2):
        counts.clear()
        for micro in range(3):
            with Recorder() as recorder:
                loss = loss_of(model.predictor, 3 * step + micro)
                if defer:
                    exchange.begin(micro)
                loss.backward()
            counts.append(sum("allreduce" in name for name, _ in recorder.seen))
        optimizer.step()
        optimizer.zero_grad()
    return {name: t.numpy() for name, t in whole_tensors(model).items()}, counts, str(exchange)


@pytest.mark.parametrize(
    ("size", "how"),
    [
        (2, {}),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(2, {"reshard_after_forward": False}, marks=pytest.mark.slow),
        pytest.param(2, {"recompute_modules": ("predictor.blocks.{*}",)}, marks=pytest.mark.slow),
    ],
)
def test_replicas_are_summed_once_a_step(size: int, how: dict[str, Any]) -> None:
    expected, always, _ = run_ranks(accumulated, 4, False, sharding_size=size, **how)[0]
    assert all(count > 0 for count in always)
    for weights, counts, text in run_ranks(accumulated, 4, True, sharding_size=size, **how):
        assert counts == [0, 0, always[-1]]
        assert "over replicas in the last one" in text
        for name, tensor in expected.items():
            np.testing.assert_allclose(weights[name], tensor, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("how", [{}, {"reshard_after_forward": False}])
def test_without_replicas_each_micro_batch_reduces(how: dict[str, Any]) -> None:
    alone = run_ranks(accumulated, 1, False)[0][0]
    for weights, counts, text in run_ranks(accumulated, 2, True, **how):
        assert counts == [0, 0, 0]
        assert text == "gradients are reduced in each micro batch"
        for name, tensor in alone.items():
            np.testing.assert_allclose(weights[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


def of_two_roots() -> list[Any]:
    """Gradients of two roots, of which each micro batch runs one."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
    roots = [fully_shard(nn.Linear(3, 2, bias=False), mesh=mesh) for _ in range(2)]
    exchange = GradientExchange(roots, mesh, 2)
    for micro, root in enumerate(roots):
        exchange.begin(micro)
        root(torch.full((1, 3), float(dist.get_rank() + micro))).sum().backward()
    return [None if p.grad is None else whole(p.grad) for root in roots for p in root.parameters()]


def test_a_root_that_the_last_micro_batch_does_not_run_is_reduced_all_the_same() -> None:
    for first, second in run_ranks(of_two_roots, 2):
        np.testing.assert_allclose(first, np.full((2, 3), 0.5))
        np.testing.assert_allclose(second, np.full((2, 3), 1.5))


# -- several meshes -----------------------------------------------------------------------------------------------------


def on_several_meshes(max_norm: float) -> list[Any]:
    """Gradients on a 1-D mesh, a 2-D one, replicated, and plain; uneven shapes among them."""
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    places: list[Any] = [
        (line, [Shard(0)]), (grid, [Replicate(), Shard(0)]), (grid, [Shard(0), Shard(0)]), (line, [Replicate()]), None,
    ]  # fmt: skip
    parameters = []
    for (value, grad), place in zip(tensors(), places, strict=True):
        parameter = nn.Parameter(value if place is None else distribute_tensor(value, *place))
        parameter.grad = grad if place is None else distribute_tensor(grad, *place)
        parameters.append(parameter)
    optimizer = ShardedAdamW(parameters, lr=0.1, weight_decay=0.1, fused=True)
    norm = scale_and_clip(parameters, torch.tensor(0.5), max_norm)
    clipped = [whole(p.grad) for p in parameters if p.grad is not None]
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(parameters)
    return [norm.item(), clipped, [whole(p) for p in parameters]]


def tensors() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(5, 3), (3, 2), (8, 2), (7,), (4,)]
    return [(torch.randn(s, generator=generator), torch.randn(s, generator=generator)) for s in shapes]


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e6])
def test_norm_and_step_over_several_meshes(max_norm: float) -> None:
    made = [nn.Parameter(value.double()) for value, _ in tensors()]
    for parameter, (_, grad) in zip(made, tensors(), strict=True):
        parameter.grad = 0.5 * grad.double()
    norm = nn.utils.clip_grad_norm_(made, max_norm or math.inf)
    clipped = [p.grad.clone() for p in made if p.grad is not None]
    torch.optim.AdamW(made, lr=0.1, weight_decay=0.1).step()
    for got_norm, got_grads, got in run_ranks(on_several_meshes, 4, max_norm):
        assert got_norm == pytest.approx(norm.item(), rel=1e-6)
        for ours, theirs in zip(got_grads, clipped, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)
        for ours, parameter in zip(got, made, strict=True):
            np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=1e-5)


def on_a_grid() -> tuple[float, Any]:
    """Norm and the whole of a tensor that is cut twice, as experts are."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep_shard", "ep"))
    own = distribute_tensor(torch.arange(48.0).view(8, 6), grid["ep"], [Shard(0)])
    module = nn.Module()
    module.weight = nn.Parameter(own)
    fully_shard(module, mesh=grid["ep_shard"])
    parameter = next(module.parameters())
    parameter.grad = parameter.detach().clone()
    norm = scale_and_clip([parameter], torch.tensor(1.0), 0.0)
    assert isinstance(parameter, DTensor)
    return norm.item(), whole_tensor(parameter).detach().numpy()


def test_a_tensor_that_is_cut_twice_is_measured_and_put_together() -> None:
    expected = np.arange(48.0).reshape(8, 6)
    for norm, tensor in run_ranks(on_a_grid, 4):
        assert norm == pytest.approx(np.linalg.norm(expected), rel=1e-6)
        np.testing.assert_array_equal(tensor, expected)


# -- clipping without waiting for the device ----------------------------------------------------------------------------


class Capture(BaseCallback):
    """What callbacks are told, and when."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.told: list[tuple[str, int]] = []
        self.records: list[StepRecord] = []
        self.weights: dict[int, dict[str, Any]] = {}

    def on_step_start(self, context: RunContext, step: int) -> None:
        self.told.append(("start", step))
        self.weights[step] = weights_of(self.trainer)

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        self.told.append(("end", record.step))
        self.records.append(record)


def run(model: str, bad_step: int = 0, stop_at: int = 0) -> dict[str, Any]:
    """Four steps of the tiny job; the loss of the last rank is NaN in `bad_step`."""
    os.chdir(ROOT)  # classic files name others from there
    world = dist.get_world_size()
    flags = parse_train_flags([
        "--mm-model", model, "--mm-data", str(ROOT / TINY / "data.json"),
        "--fsdp2-config-path", str(ROOT / TINY / "fsdp2.yaml"), "--lr", "1e-3", "--seed", "7", "--num-workers", "0",
        "--train-iters", "4", "--micro-batch-size", "1", "--global-batch-size", str(2 * world), "--clip-grad", "0.5",
    ])  # fmt: skip
    job = load_training_job(flags)
    trainer = Trainer(job, Accelerator.current(), None, build_dataset(job.components["dataset"], flags.seed))
    capture = Capture(trainer)
    trainer.callbacks = [capture]
    loss = trainer.task.loss

    def broken(outputs: Any, inputs: Any) -> Any:
        sums, weights, metrics = loss(outputs, inputs)
        if trainer.step + 1 == bad_step and dist.get_rank() == world - 1:
            sums = sums * float("nan")
        return sums, weights, metrics

    trainer.task.loss = broken
    error = None
    try:
        trainer.train(lambda: bool(stop_at) and trainer.step + 1 >= stop_at)
    except NonFiniteLossError as caught:
        error = str(caught)
    return {
        "told": capture.told,
        "losses": [(r.step, r.loss, r.grad_norm, r.consumed_samples) for r in capture.records],
        "error": error,
        "before": capture.weights.get(bad_step),
        "after": weights_of(trainer),
    }


def weights_of(trainer: Trainer) -> dict[str, Any]:
    return {name: whole(p) for name, p in trainer.model.predictor.named_parameters()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A model file for each value of `clip_grad_async`."""
    text = (ROOT / TINY / "model.json").read_text(encoding="utf-8")
    folder: Path = tmp_path_factory.mktemp("models")
    paths = {}
    for value in (False, True):
        path = folder / f"{value}.json"
        start = text.index("{") + 1
        path.write_text(
            f'{text[:start]} "patch": {{"clip_grad_async": {str(value).lower()}}}, {text[start:]}'
        )
        paths[value] = str(path)
    return paths


@pytest.mark.slow
def test_clipping_without_waiting_changes_no_number(models: dict[bool, str]) -> None:
    at_once, later = (run_ranks(run, 2, models[value], timeout=120)[0] for value in (False, True))
    assert [step for step, *_ in later["losses"]] == [1, 2, 3, 4]
    for ours, theirs in zip(later["losses"], at_once["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for name, tensor in at_once["after"].items():
        np.testing.assert_allclose(later["after"][name], tensor, rtol=1e-5, atol=1e-7, err_msg=name)
    assert at_once["told"][:4] == [("start", 1), ("end", 1), ("start", 2), ("end", 2)]
    # Numbers come when the next step is under way, and the last ones before the end.
    assert later["told"][:3] == [("start", 1), ("start", 2), ("end", 1)]
    assert later["told"][-2:] == [("end", 3), ("end", 4)]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("bad_step", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_no_weight(
    models: dict[bool, str], later: bool, bad_step: int
) -> None:
    for rank, result in enumerate(run_ranks(run, 2, models[later], bad_step, timeout=120)):
        assert result["error"].startswith(f"step {bad_step}: loss nan")
        assert f"the weights are those of step {bad_step - 1}" in result["error"]
        assert f"Samples of rank {rank}" in result["error"]
        assert [step for step, *_ in result["losses"]] == list(range(1, bad_step))
        for name, tensor in result["before"].items():
            np.testing.assert_array_equal(result["after"][name], tensor, err_msg=name)


def test_a_stop_is_heard_one_step_later(models: dict[bool, str]) -> None:
    at_once, later = (run_ranks(run, 1, models[value], 0, 2, timeout=120)[0] for value in (False, True))
    assert [step for step, *_ in at_once["losses"]] == [1, 2]
    assert [step for step, *_ in later["losses"]] == [1, 2, 3]
