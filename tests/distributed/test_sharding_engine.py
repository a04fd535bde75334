"""What the engine makes of unusual plans and models: groups, ties, frozen parts, shapes that do not divide."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mm_core.accelerator import Accelerator
from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import FSDP2Mixin, ShardingPolicy
from mm_core.sharding.observe import differences, observe_plan
from mm_core.sharding.plan import ALIGNED, ShardingError
from mm_core.weights import materialize
from mm_core.weights.tensors import named_parameters
from tests.distributed.against_one import distance, gradients, whole
from tests.distributed.harness import run_ranks
from tests.distributed.models import DENSE, MOE, TinyModel

pytestmark = pytest.mark.timeout(180)
LAYERS = ("predictor.model.layers.{*}",)
NORMS = (
    "model.layers.{*}.input_layernorm",
    "model.layers.{*}.post_attention_layernorm",
    "model.layers.{*}.self_attn.q_norm",
)
AHEAD = {"recompute_modules": LAYERS, "num_to_forward_prefetch": 1, "num_to_backward_prefetch": 2}
REENTRANT = {"recompute_modules": LAYERS, "use_reentrant": True}
EXPERTS_HSDP = {"expert_parallel_size": 2, "sharding_size": 2}
GATES = ("model.layers.{*}.mlp.gate",)


def with_policy(model: TinyModel, **fields: Any) -> TinyModel:
    return replace(model, policy=replace(model.policy, **fields))


@pytest.fixture(scope="module")
def one_dense() -> dict[str, Any]:
    return run_ranks(gradients, 1, DENSE)[0]


@pytest.fixture(scope="module")
def one_moe() -> dict[str, Any]:
    return run_ranks(gradients, 1, MOE)[0]


@pytest.mark.parametrize(
    ("world", "aligned", "fsdp2"),
    [
        pytest.param(2, (*NORMS, *GATES, "model.norm"), {}, id="2"),
        pytest.param(2, (*NORMS, "model.norm"), AHEAD, id="2-recompute-prefetch"),
        # Without the last norm the group's last module runs inside a recomputed one.
        pytest.param(2, NORMS, REENTRANT, id="2-reentrant", marks=pytest.mark.slow),
        pytest.param(2, NORMS, {"offload_to_cpu": True}, id="2-offload", marks=pytest.mark.slow),
        pytest.param(4, (*NORMS, *GATES), EXPERTS_HSDP, id="4-experts-hsdp", marks=pytest.mark.slow),
    ],
)
def test_a_group_of_norms_and_gates_has_the_gradients_of_one_process(world, aligned, fsdp2, one_moe):
    model = with_policy(MOE, aligned=aligned)
    found = run_ranks(gradients, world, model, align_fsdp_param_groups=True, **fsdp2)[0]
    assert distance(found, one_moe) < 1e-6


def test_a_group_of_norms_computes_in_bf16_and_stays_gathered(one_dense):
    model = with_policy(DENSE, aligned=(*NORMS, "model.norm"))

    def run() -> tuple[list[str], bool, bool, set[str], dict[str, Any]]:
        composite = model.composite()
        composite.fully_shard(
            None, Fsdp2Config(align_fsdp_param_groups=True, param_dtype="bf16", reduce_dtype="fp32")
        )
        materialize(composite.predictor, "cpu", 0)
        plan = composite.sharding_plans["predictor"]
        held = {p.name.split(".")[-2] for unit in plan.units if unit.path == ALIGNED for p in unit.parameters}
        loss, _ = model.loss(composite.predictor, 0, dist.get_rank(), 2)
        norm, block = composite.predictor.model.norm, composite.predictor.model.layers[0].mlp.up_proj
        after_forward = (isinstance(norm.weight, DTensor), isinstance(block.weight, DTensor))
        loss.backward()
        return [u.path for u in plan.units], *after_forward, held, {}

    units, norm_is_cut, block_is_cut, held, _ = run_ranks(run, 2)[0]
    assert units == ["model.layers.0", ALIGNED, "model.layers.1", "model.layers.2"]
    assert (norm_is_cut, block_is_cut) == (False, True)
    assert held == {"input_layernorm", "post_attention_layernorm", "q_norm", "norm"}
    found = run_ranks(
        gradients, 2, model, align_fsdp_param_groups=True, param_dtype="bf16", reduce_dtype="fp32"
    )[0]
    assert distance(found, one_dense) < 2e-2


def test_tied_weights_stay_tied_when_a_policy_names_both_their_modules(one_dense):
    model = with_policy(DENSE, units=("model.embed_tokens", "model.layers.{*}", "lm_head"))

    def run() -> tuple[list[str], list[str], bool]:
        composite = model.composite()
        composite.fully_shard(None, Fsdp2Config())
        plan, predictor = composite.sharding_plans["predictor"], composite.predictor
        tied = predictor.lm_head.weight is predictor.model.embed_tokens.weight
        return [u.path for u in plan.units], [p.name for p in plan.root.parameters], tied

    units, root, tied = run_ranks(run, 2)[0]
    assert units == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert root == ["model.embed_tokens.weight", "model.norm.weight"]
    assert tied
    assert distance(run_ranks(gradients, 2, model)[0], one_dense) < 1e-6


class Odd(nn.Module):
    """Shapes that no number of ranks divides, a tie, frozen parts, and units of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.gain = nn.ParameterDict(
            {"one": nn.Parameter(torch.ones(1)), "three": nn.Parameter(torch.ones(3, 7))}
        )
        self.pair = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
        self.frozen = nn.Linear(7, 7)
        self.again, self.more = nn.Linear(7, 7), nn.Linear(7, 7)
        self.last = nn.Linear(7, 3, bias=False)
        self.pair[0].requires_grad_(False)
        self.frozen.requires_grad_(False)
        self.again.weight = self.more.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x)) * self.gain["one"] + self.gain["three"].sum(0)
        return self.last(self.again(self.more(self.frozen(self.pair(x)))))


class OddComposite(nn.Module, FSDP2Mixin):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.predictor = Odd()

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"predictor": ShardingPolicy(units=("first", "pair", "frozen", "again", "more", "last"))}


def odd_gradients(**fsdp2: Any) -> dict[str, Any]:
    composite = OddComposite()
    composite.fully_shard(None, Fsdp2Config(**fsdp2))
    x = torch.linspace(-1, 1, 60).view(12, 5)
    rank, world = dist.get_rank(), dist.get_world_size()
    composite.predictor(x.chunk(world)[rank]).square().mean().backward()
    return {n: whole(p.grad) for n, p in named_parameters(composite.predictor) if p.grad is not None}


@pytest.mark.parametrize(
    ("world", "fsdp2"),
    [
        (2, {}),
        (3, {"recompute_modules": ("predictor.pair",)}),
        (4, {"num_to_forward_prefetch": 2, "num_to_backward_prefetch": 2}),
        (4, {"sharding_size": 2, "reshard_after_forward": False}),
        (4, {"reshard_after_forward": 2, "offload_to_cpu": True}),
        (2, {"sharding_size": 1}),
    ],
)
def test_uneven_shapes_frozen_parts_and_ties(world, fsdp2):
    one = run_ranks(odd_gradients, 1)[0]
    found = run_ranks(odd_gradients, world, **fsdp2)[0]
    assert "pair.1.weight" in found
    assert not any(name.startswith(("frozen", "pair.0")) for name in found)
    assert distance(found, one) < 1e-6


@pytest.mark.parametrize(
    "fsdp2",
    [
        {},
        {"recompute_modules": LAYERS, "num_to_forward_prefetch": 9, "num_to_backward_prefetch": 2},
        {
            "recompute_modules": LAYERS,
            "use_reentrant": True,
            "num_to_forward_prefetch": 1,
            "expert_parallel_size": 2,
        },
        {
            "align_fsdp_param_groups": True,
            "param_dtype": "bf16",
            "reduce_dtype": "fp32",
            "output_dtype": "fp32",
        },
        {"reshard_after_forward": False, "num_to_backward_prefetch": 1, "cast_forward_inputs": False},
        {
            "reshard_after_forward": 2,
            "offload_to_cpu": True,
            "expert_parallel_size": 2,
            "align_fsdp_param_groups": True,
        },
        {"sub_modules_to_wrap": (), "num_to_forward_prefetch": 1},
        {
            "sharding_size": 1,
            "ignored_modules": ("predictor.model.layers.0.mlp.gate",),
            "reshard_local_experts": False,
        },
    ],
)
def test_the_engine_does_what_the_plan_says_and_is_read_back_so(fsdp2):
    model = with_policy(MOE, aligned=NORMS, keep_gathered=("model.layers.2",))

    def run() -> tuple[bool, dict[str, str]]:
        composite = model.composite()
        composite.predictor.model.layers[0].mlp.gate.requires_grad_(False)
        kwargs, config = composite._pre_fully_shard(None, Fsdp2Config(**fsdp2))
        asked = composite.sharding_plans["predictor"]
        composite._fully_shard(kwargs, config)
        seen = observe_plan(composite.predictor, asked)
        return (seen.units, seen.root) == (asked.units, asked.root), differences(asked, seen)

    for same, found in run_ranks(run, 2):
        assert found == {}
        assert same


class Heedless(nn.Module, FSDP2Mixin):
    """Shards itself as MindSpeed-MM's Qwen3-VL does: its own units, recomputation and prefetch, whatever is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"": ShardingPolicy(units=("blocks.{*}",))}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def _fully_shard(self, fsdp2_kwargs: dict[str, Any], fsdp2_config: Fsdp2Config) -> None:
        for block in self.blocks[:2]:
            fully_shard(block, **{**fsdp2_kwargs, "reshard_after_forward": False})
        fully_shard(self)
        first, second = self.blocks[:2]
        assert isinstance(first, FSDPModule)
        assert isinstance(second, FSDPModule)
        first.set_modules_to_forward_prefetch([second])


def test_keys_that_a_class_does_not_follow_are_named():
    asked = {
        "sub_modules_to_wrap": ("blocks.{*}",),
        "recompute_modules": ("blocks.0",),
        "num_to_forward_prefetch": 2,
        "num_to_backward_prefetch": 1,
        "reshard_after_forward": True,
        "param_dtype": "bf16",
        "output_dtype": "fp32",
        "offload_to_cpu": False,
        "sharding_size": 1,
    }

    def run(fsdp2: dict[str, Any]) -> list[str]:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("mm_core.sharding.mixin").addHandler(handler)
        Heedless().fully_shard(None, Fsdp2Config(**fsdp2))
        return lines

    start = "(root) did not follow "
    assert run_ranks(run, 2, asked)[0] == [
        start
        + "sub_modules_to_wrap of fsdp2.yaml: [blocks.0, blocks.1, blocks.2] was asked for, [blocks.0, blocks.1] is there.",
        start + "recompute_modules of fsdp2.yaml: [blocks.0] was asked for, [] is there.",
        start + "reshard_after_forward of fsdp2.yaml: true was asked for, false is there.",
        start + "param_dtype of fsdp2.yaml: bf16 was asked for, null is there.",
        start + "output_dtype of fsdp2.yaml: fp32 was asked for, null is there.",
        start + "num_to_forward_prefetch of fsdp2.yaml: 2 was asked for, 1 is there.",
        start + "sharding_size of fsdp2.yaml: 1 was asked for, 1, 2 is there.",
    ]
    # What nobody asked for is the class's own affair.
    assert run_ranks(run, 2, {})[0] == []


def test_the_hooks_of_the_mixin_run_in_order_and_can_be_replaced():
    class Watched(Heedless):
        def _pre_fully_shard(self, *args: Any) -> Any:
            self.calls = ["pre"]
            return super()._pre_fully_shard(*args)

        def _fully_shard(self, fsdp2_kwargs: dict[str, Any], fsdp2_config: Fsdp2Config) -> None:
            self.calls.append("shard")
            FSDP2Mixin._fully_shard(self, fsdp2_kwargs, fsdp2_config)

        def _post_fully_shard(self) -> None:
            super()._post_fully_shard()
            self.calls.append("post")

    def run() -> tuple[bool, list[str], list[str]]:
        model = Watched()
        done = model.fully_shard(None, None)
        return done, model.calls, [unit.path for unit in model.sharding_plans[""].units]

    assert run_ranks(run, 2)[0] == (True, ["pre", "shard", "post"], ["blocks.0", "blocks.1", "blocks.2"])


def test_a_parameter_without_a_dimension_is_named():
    class Scaled(Heedless):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def _fully_shard(self, fsdp2_kwargs: dict[str, Any], fsdp2_config: Fsdp2Config) -> None:
            FSDP2Mixin._fully_shard(self, fsdp2_kwargs, fsdp2_config)

    def run() -> str:
        try:
            Scaled().fully_shard(None, None)
        except ShardingError as error:
            return str(error)
        return "nothing raised"

    assert run_ranks(run, 2)[0].startswith(
        "scale is a single number without a dimension, which FSDP2 cannot cut; "
    )
    assert run_ranks(run, 1)[0] == "nothing raised"


def test_devices_that_know_sums_only_get_sums(monkeypatch):
    """As HCCL, which has no pre-multiplied sum; no such device is here."""
    one = run_ranks(odd_gradients, 1)[0]
    monkeypatch.setattr(Accelerator, "forces_sum_reduction", True)

    def run(**fsdp2: Any) -> tuple[set[str], dict[str, Any]]:
        used: set[str] = set()

        def watch(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                used.add(str(kwargs["op"]))
                return function(*args, **kwargs)

            return call

        # The last two are one operation, under the names that releases of torch call it by.
        for name in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single"):
            if hasattr(dist, name):
                setattr(dist, name, watch(getattr(dist, name)))
        return used, odd_gradients(**fsdp2)

    for size in (4, 2, 1):
        used, found = run_ranks(run, 4, sharding_size=size)[0]
        assert {name.rpartition(".")[2] for name in used} == {"SUM"}
        assert distance(found, one) < 1e-6


def test_post_meta_init_runs_when_a_model_has_left_the_meta_device():
    class Rebuilds(Heedless):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0), persistent=False)

        def post_meta_init(self) -> None:
            assert not self.blocks[0].weight.is_meta
            self.table.copy_(torch.arange(3.0))

    def run() -> list[float]:
        with torch.device("meta"):
            model = Rebuilds()
        model.fully_shard(None, None)
        materialize(model, "cpu", 0)
        return model.table.tolist()

    assert run_ranks(run, 2)[1] == [0.0, 1.0, 2.0]
