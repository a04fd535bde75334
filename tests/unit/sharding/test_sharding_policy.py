"""A plugin's policy that is wrong in type or value: one sentence that begins with the field."""

from typing import Any

import pytest
import torch
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy, build_plan
from mm_core.sharding.fitness import check_plan
from mm_core.sharding.patterns import PlanError, Problems
from mm_core.sharding.plan import ShardingError
from mm_core.sharding.policy import policy_problem


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"units": "blocks"}, 'units: "blocks" is one text, expected a tuple of them; write ("blocks",)'),
        ({"units": 3}, "units: 3 is of type int"),
        ({"units": None}, "units: null is of type NoneType"),
        ({"recompute": (1,)}, "recompute: 1 is of type int, expected a text"),
        ({"units": ("blocks.{",)}, 'units: "blocks.{": unbalanced braces'),
        ({"fp32_inputs": "timestep"}, 'fp32_inputs: "timestep" is one text'),
        ({"aliases": ["head"]}, 'aliases: ["head"] is of type list'),
        ({"aliases": {"head": 3}}, "aliases: 3 is of type int"),
        ({"aliases": {"head..x": "proj"}}, 'aliases: "head..x": an empty name'),
        ({"recompute_granularity": "fulll"}, 'Did you mean "full"?'),
        ({"recompute_num_layers": -1}, '"recompute_num_layers" is -1: must be at least 1'),
        ({"reshard_after_forward": "yes"}, '"reshard_after_forward" is "yes"'),
        ({"param_dtype": torch.bfloat16}, '"param_dtype" is torch.bfloat16'),
        ({"num_to_forward_prefetch": -2}, '"num_to_forward_prefetch" is -2'),
    ],
)
def test_a_wrong_field(fields: dict[str, Any], words: str) -> None:
    policy = ShardingPolicy(**fields)
    assert words in (policy_problem(policy) or "")
    with pytest.raises(ShardingError, match="policy of predictor, ") as raised:
        build_plan(Net(), policy, Fsdp2Config())
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"units": ["blocks.{*}"]},
        {"reshard_after_forward": 2, "param_dtype": "bf16"},
        {"aliases": {"a": "b"}},
    ],
)
def test_a_right_one(fields: dict[str, Any]) -> None:
    assert policy_problem(ShardingPolicy(**fields)) is None


def test_a_number_of_the_policy_that_does_not_divide_the_ranks_is_not_blamed_on_the_file() -> None:
    net = Net()
    plan = build_plan(net, ShardingPolicy(units=("blocks.{*}",), reshard_after_forward=5), Fsdp2Config())
    with pytest.raises(
        PlanError, match=r"policy of predictor, reshard_after_forward: 5 .* true, false or 2"
    ) as raised:
        check_plan(plan, net, ranks=2, shards=2)
    assert raised.value.field is None


def test_an_aligned_group_that_the_policy_asks_for_and_does_not_name() -> None:
    with pytest.raises(PlanError, match="names no norms or gates"):
        build_plan(Net(), ShardingPolicy(align_fsdp_param_groups=True), Fsdp2Config())


def test_one_replica_has_no_number_to_offer() -> None:
    net = Net()
    plan = build_plan(net, ShardingPolicy(), Fsdp2Config(sharding_size=1, reshard_after_forward=2))
    with pytest.raises(PlanError, match=r"the one rank that holds the parameters; use true or false\.$"):
        check_plan(plan, net, ranks=2, shards=1)


def test_what_is_wrong_with_each_block_is_said_once() -> None:
    written = Fsdp2Config(recompute_modules=("predictor.blocks.{*}", "predictor.blocks.{*}.0"))
    with pytest.raises(PlanError) as raised:
        build_plan(Net(), ShardingPolicy(), written)
    assert str(raised.value).count("is recomputed as a whole") == 1


def test_an_ordinary_layer_holds_no_experts() -> None:
    """Found before a rank starts, not when the experts are dealt out."""
    written = Fsdp2Config(moe_modules=("predictor.blocks.{*}.0",), expert_parallel_size=2)
    with pytest.raises(PlanError, match="is called with \\(input\\), so its tokens cannot be exchanged"):
        build_plan(Net(), ShardingPolicy(), written)


def test_kept_errors_hold_no_frames() -> None:
    """Two hundred patterns of long ranges would keep all names of each."""
    problems = Problems()
    with problems.of():
        raise ShardingError("wrong")
    assert problems.errors[0].__traceback__ is None


def test_a_pattern_inside_a_frozen_part(tmp_path: Any) -> None:
    from mm_core.sharding import build_plans

    whole = nn.Module()
    whole.predictor, whole.ae = Net(), nn.Identity()
    written = Fsdp2Config(ignored_modules=("ae.decoder",))
    with pytest.raises(PlanError, match=r'lies in "ae", which is not trained .* write "ae"'):
        build_plans({"predictor": whole.predictor}, {"predictor": ShardingPolicy()}, written, whole)
