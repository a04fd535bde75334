"""Experts that are dealt out over ranks train as in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import FSDP2Mixin, ShardingPolicy
from mm_core.sharding.experts import exchange_tokens
from mm_core.weights import load_checkpoint, materialize, resolve_load, save_checkpoint
from mm_core.weights.tensors import named_parameters
from mm_registry.errors import UserError
from tests.distributed.against_one import distance, gradients, train, whole
from tests.distributed.harness import run_ranks
from tests.distributed.models import MOE, moe, optimizer_of

pytestmark = pytest.mark.timeout(180)
LAYERS = "predictor.model.layers.{*}"


@pytest.fixture(scope="module")
def one_rank() -> tuple[list[float], dict[str, Any]]:
    return run_ranks(train, 1, MOE)[0]


@pytest.mark.parametrize(
    ("world", "fsdp2"),
    [
        pytest.param(2, {"expert_parallel_size": 2}, id="2-of-2"),
        pytest.param(4, {"expert_parallel_size": 2}, id="2-of-4"),
        pytest.param(4, {"expert_parallel_size": 4}, id="4-of-4"),
        pytest.param(
            4, {"expert_parallel_size": 2, "sharding_size": 2}, id="2-of-4-hsdp", marks=pytest.mark.slow
        ),
        pytest.param(
            2, {"expert_parallel_size": 2, "sharding_size": 1}, id="2-of-2-replicated", marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            {
                "expert_parallel_size": 2,
                "recompute_modules": (LAYERS,),
                "num_to_forward_prefetch": 2,
                "num_to_backward_prefetch": 2,
            },
            id="2-of-2-recompute",
        ),
        pytest.param(
            2,
            {
                "expert_parallel_size": 2,
                "recompute_modules": (LAYERS,),
                "use_reentrant": True,
                "num_to_forward_prefetch": 1,
            },
            id="2-of-2-reentrant",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            {"expert_parallel_size": 2, "reshard_local_experts": False},
            id="2-of-2-kept",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            {"expert_parallel_size": 2, "offload_to_cpu": True},
            id="2-of-2-offload",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_same_losses_and_weights_as_one_process(world, fsdp2, one_rank):
    losses, weights = run_ranks(train, world, MOE, **fsdp2)[0]
    np.testing.assert_allclose(losses, one_rank[0], rtol=1e-5)
    assert distance(weights, one_rank[1]) < 1e-5


@pytest.fixture(scope="module")
def one_gradient() -> dict[str, Any]:
    return run_ranks(gradients, 1, MOE)[0]


@pytest.mark.parametrize(
    ("world", "size", "fsdp2"),
    [
        pytest.param(2, 2, {}, id="2-of-2"),
        pytest.param(4, 2, {}, id="2-of-4"),
        pytest.param(4, 4, {"recompute_modules": (LAYERS,)}, id="4-of-4-recompute", marks=pytest.mark.slow),
        pytest.param(4, 2, {"sharding_size": 2}, id="2-of-4-hsdp", marks=pytest.mark.slow),
        pytest.param(4, 4, {"sharding_size": 2}, id="4-of-4-hsdp"),
    ],
)
def test_gradients_are_those_of_one_process(world, size, fsdp2, one_gradient):
    """AdamW hides a wrong factor, gradients show it; also over several micro batches."""
    found = run_ranks(gradients, world, MOE, expert_parallel_size=size, **fsdp2)[0]
    assert distance(found, one_gradient) < 1e-6


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts_computes_the_same(implementation):
    model = replace(MOE, make=lambda: moe(implementation))
    one = run_ranks(gradients, 1, model)[0]
    found = run_ranks(gradients, 2, model, expert_parallel_size=2)[0]
    assert distance(found, one) < 1e-6


def test_bf16_compute_stays_near_fp32(one_gradient):
    found = run_ranks(gradients, 2, MOE, expert_parallel_size=2, param_dtype="bf16", reduce_dtype="fp32")[0]
    assert 1e-4 < distance(found, one_gradient) < 2e-2


def test_a_rank_keeps_its_own_experts_and_sees_all_of_them():
    def look() -> dict[str, Any]:
        composite = MOE.composite()
        composite.fully_shard(None, Fsdp2Config(expert_parallel_size=2))
        materialize(composite.predictor, "cpu", 0)
        experts = composite.predictor.model.layers[0].mlp.experts
        plan = composite.sharding_plans["predictor"]
        return {
            "local": tuple(experts.down_proj.to_local().shape),
            "whole": tuple(experts.down_proj.full_tensor().shape),
            "mesh": experts.down_proj.device_mesh.mesh_dim_names,
            "units": [unit.path for unit in plan.units][:2],
            "experts": len(plan.experts),
        }

    assert run_ranks(look, 4)[3] == {
        "local": (2, 48, 20),
        "whole": (8, 48, 20),
        "mesh": ("ep_shard", "ep"),
        "units": ["model.layers.0", "model.layers.0.mlp.experts"],
        "experts": 3,
    }


@pytest.mark.parametrize(("experts", "inside"), [(2, 6), (6, 5), (2, 5)])
def test_experts_that_no_number_of_ranks_divides_are_cut_inside_or_unevenly(experts, inside):
    """4 ranks, 2 to share: 1 or 3 experts a rank, to be cut over 2 ranks."""

    def run() -> dict[str, Any]:
        composite = Loose(experts, inside)
        composite.fully_shard(None, Fsdp2Config(expert_parallel_size=min(2, dist.get_world_size())))
        rank, world = dist.get_rank(), dist.get_world_size()
        composite.predictor(
            torch.linspace(-1, 1, 8 * inside).view(8, inside).chunk(world)[rank]
        ).sum().backward()
        values = {name: whole(p) for name, p in named_parameters(composite.predictor)}
        return values | {f"{n}.grad": whole(p.grad) * world for n, p in named_parameters(composite.predictor)}

    assert distance(run_ranks(run, 4)[0], run_ranks(run, 1)[0]) < 1e-6


class Table(nn.Module):
    """Experts that are a matrix each."""

    def __init__(self, experts: int, size: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.matrix = nn.Parameter(torch.randn(experts, size, size))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        assert self.matrix.shape[0] == self.num_experts  # local experts, local count
        rows = torch.einsum("th,tkhj->tkj", hidden_states, self.matrix[top_k_index])
        return (rows * top_k_weights.unsqueeze(-1)).sum(1)


class Router(nn.Module):
    """Sends each token to two experts: tokens of the first half of the values to the first experts only."""

    def __init__(self, experts: int, size: int, table: type[nn.Module] = Table) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.experts = table(experts, size)
        self.number = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        first = (x.detach().sum(-1) > 0).long() * (self.number - 2)
        index = torch.stack([first, first + 1], -1)
        weights = torch.softmax(x[:, :2], -1)
        return self.experts(x, index, weights)


class Loose(nn.Module, FSDP2Mixin):
    def __init__(self, experts: int = 4, size: int = 6, table: type[nn.Module] = Table) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.predictor = Router(experts, size, table)

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"predictor": ShardingPolicy(experts=("experts",))}


def test_ranks_without_tokens_take_part():
    """All tokens go to one rank's experts, and the other rank has no token to send."""

    def run() -> dict[str, Any]:
        composite = Loose()
        composite.fully_shard(None, Fsdp2Config(expert_parallel_size=dist.get_world_size()))
        rank, world = dist.get_rank(), dist.get_world_size()
        tokens = torch.full((3, 6), 0.5) if rank == 0 else torch.zeros(0, 6)
        composite.predictor(tokens).sum().backward()
        return {n: whole(p.grad) * world for n, p in named_parameters(composite.predictor)}

    one, (two, _) = run_ranks(run, 1)[0], run_ranks(run, 2)
    assert distance(two, one) < 1e-6
    assert not two["experts.matrix"][:2].any()
    assert two["experts.matrix"][2:].any()


def test_frozen_experts_are_dealt_out_and_have_no_gradient():
    def run() -> list[str]:
        composite = Loose()
        composite.predictor.experts.requires_grad_(False)
        composite.fully_shard(None, Fsdp2Config(expert_parallel_size=2))
        composite.predictor(torch.ones(2, 6)).sum().backward()
        return [name for name, p in named_parameters(composite.predictor) if p.grad is not None]

    assert run_ranks(run, 2) == [["scale"], ["scale"]]


class StaticExchange(Table):
    """Written for MindSpeed-MM, which calls `ep_forward(ep_group, module, …)` where experts are dealt out."""

    @staticmethod
    def ep_forward(
        group: Any, self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> Any:
        assert self.num_experts == 2 * self.matrix.shape[0]  # all experts, this rank's matrices
        return exchange_tokens(
            hidden,
            index,
            weights,
            lambda rows, expert: torch.einsum("th,thj->tj", rows, self.matrix[expert]),
            4,
            group,
        )


class MethodExchange(Table):
    def ep_forward(self, group: Any, *args: torch.Tensor) -> Any:
        return StaticExchange.ep_forward(group, self, *args)


@pytest.mark.parametrize("table", [StaticExchange, MethodExchange])
def test_modules_with_an_exchange_of_their_own_keep_it(table):
    def run(kind: type[nn.Module]) -> dict[str, Any]:
        composite = Loose(table=kind)
        composite.fully_shard(None, Fsdp2Config(expert_parallel_size=dist.get_world_size()))
        rank, world = dist.get_rank(), dist.get_world_size()
        composite.predictor(torch.linspace(-1, 1, 48).view(8, 6).chunk(world)[rank]).sum().backward()
        return {n: whole(p.grad) * world for n, p in named_parameters(composite.predictor)}

    assert distance(run_ranks(run, 2, table)[0], run_ranks(run, 1, Table)[0]) < 1e-6


class Calls(Table):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class Nested(Table):
    def __init__(self, experts: int, size: int) -> None:
        super().__init__(experts, size)
        self.inner = nn.Linear(size, experts)


class Uncounted(Table):
    def __init__(self, experts: int, size: int) -> None:
        super().__init__(experts, size)
        self.bias = nn.Parameter(torch.zeros(size))


@pytest.mark.parametrize(
    ("table", "size", "message"),
    [
        (Table, 2, "nothing raised"),
        (Table, 4, "expert_parallel_size: 4 does not divide the 2 data-parallel ranks; use one of 1, 2."),
        (Calls, 2, '"predictor.experts" is called with (hidden_states), so its tokens cannot be exchanged; '),
        (Nested, 2, '"predictor.experts" keeps inner.weight in a module of its own; '),
        (Uncounted, 2, 'the parameters of "predictor.experts" do not agree on a number of experts'),
    ],
)
def test_what_cannot_be_dealt_out_is_an_error(table, size, message):
    def run() -> str:
        composite = Loose(table=table)
        try:
            composite.fully_shard(None, Fsdp2Config(expert_parallel_size=size))
        except UserError as error:
            return str(error)
        return "nothing raised"

    found = run_ranks(run, 2)[0]
    assert message in found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 2), (2, 1)),
        pytest.param((2, 2), (4, 4), marks=pytest.mark.slow),
        pytest.param((2, 1), (2, 2), marks=pytest.mark.slow),
    ],
)
def test_checkpoints_move_between_ways_to_deal_out_experts(before, after, tmp_path):
    def model(size: int, seed: int) -> tuple[Any, torch.optim.Optimizer]:
        composite = MOE.composite()
        composite.fully_shard(None, Fsdp2Config(expert_parallel_size=size))
        materialize(composite.predictor, "cpu", seed)
        return composite, optimizer_of(composite.predictor)

    def step(composite: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        (MOE.loss(composite.predictor, number, rank, world)[0] * world / 100).backward()
        optimizer.step()
        optimizer.zero_grad()

    def save(size: int) -> dict[str, Any]:
        composite, optimizer = model(size, 0)
        step(composite, optimizer, 0)
        state = {"step": 1, "consumed_samples": 8, "seed": 0}
        save_checkpoint(tmp_path, 1, {"predictor": composite.predictor}, optimizer, state)
        step(composite, optimizer, 1)
        return {name: whole(p) for name, p in named_parameters(composite.predictor)}

    def load(size: int) -> dict[str, Any]:
        composite, optimizer = model(size, 1)
        load_checkpoint(resolve_load(tmp_path), {"predictor": composite.predictor}, optimizer, with_rng=False)
        step(composite, optimizer, 1)
        return {name: whole(p) for name, p in named_parameters(composite.predictor)}

    saved = run_ranks(save, before[0], before[1])[0]
    assert distance(run_ranks(load, after[0], after[1])[0], saved) < 1e-6


@pytest.mark.parametrize(
    "fsdp2",
    [
        {"recompute_modules": (LAYERS,), "recompute_granularity": "selective"},
        pytest.param({"offload_activations": (LAYERS,)}, marks=pytest.mark.slow),
    ],
)
def test_the_exchange_goes_with_other_ways_to_save_activations(fsdp2, one_gradient):
    found = run_ranks(gradients, 2, MOE, expert_parallel_size=2, **fsdp2)[0]
    assert distance(found, one_gradient) < 1e-6


@pytest.mark.slow
def test_experts_inside_a_group_leave_the_other_ranks_alone():
    def run(members: list[int]) -> dict[str, Any] | None:
        group = dist.new_group(members)
        if dist.get_rank() not in members:
            return None
        composite = Loose()
        composite.fully_shard(group, Fsdp2Config(expert_parallel_size=min(2, len(members))))
        rank, world = members.index(dist.get_rank()), len(members)
        composite.predictor(torch.linspace(-1, 1, 48).view(8, 6).chunk(world)[rank]).sum().backward()
        return {n: whole(p.grad) * world for n, p in named_parameters(composite.predictor)}

    (one,) = run_ranks(run, 1, [0])
    first, *found = run_ranks(run, 5, [1, 2, 3, 4])
    assert first is None
    assert all(distance(gradient, one) < 1e-6 for gradient in found)
