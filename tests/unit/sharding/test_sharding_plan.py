"""From policy and fsdp2.yaml to a plan: precedence, checks and what the table says. No process group."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy, build_plan, build_plans
from mm_core.sharding.mesh import shard_size
from mm_core.sharding.mixin import load_fsdp2_config
from mm_core.sharding.patterns import PlanError
from mm_core.sharding.plan import ShardingError
from mm_core.sharding.rows import unit_rows
from mm_registry.errors import UserError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(6, 6)
        self.ffn = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(self.attn(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.table = nn.Parameter(torch.zeros(2, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Composite(nn.Module):
    def __init__(self, *, low: bool = False, encoder: bool = True) -> None:
        super().__init__()
        with torch.device("meta"):
            self.predictor = Net()
            self.low_noise_predictor = Net() if low else None
        self.text_encoder = nn.Linear(2, 2).requires_grad_(False) if encoder else None


def plan(policy: ShardingPolicy | None = None, net: nn.Module | None = None, **fsdp2: Any) -> Any:
    return build_plan(net or Net(), policy or ShardingPolicy(), Fsdp2Config(**fsdp2))


def test_without_policy_or_file_the_blocks_are_found_by_structure():
    made = plan()
    assert [u.path for u in made.units] == ["blocks.0", "blocks.1", "blocks.2"]
    assert {p.name for p in made.root.parameters} == {
        "embed.weight",
        "embed.bias",
        "table",
        "head.weight",
        "head.bias",
    }
    assert made.sources["sub_modules_to_wrap"] == "structure"
    assert set(made.sources.values()) == {"structure", "default"}
    assert set(made.sources) == set(Fsdp2Config.model_fields) - {"moe_modules", "offload_idle_predictor"}


def test_a_field_of_the_file_wins_over_the_policys_field_and_only_that_one():
    policy = ShardingPolicy(units=("blocks.{*}", "head"), recompute=("blocks.{*}",))
    made = plan(policy, sub_modules_to_wrap=("predictor.blocks.{0-1}",))
    assert [u.path for u in made.units] == ["blocks.0", "blocks.1"]
    assert made.recompute == ("blocks.0", "blocks.1", "blocks.2")
    assert made.sources["sub_modules_to_wrap"] == "fsdp2.yaml"
    assert made.sources["recompute_modules"] == "policy"
    assert plan(policy, recompute_modules=()).recompute == ()
    assert plan(policy, sub_modules_to_wrap=()).units == ()


def test_every_parameter_is_in_exactly_one_unit_also_when_units_nest():
    net = Net()
    made = plan(net=net, sub_modules_to_wrap=("predictor.blocks.{*}", "predictor.blocks.{*}.ffn"))
    names = [p.name for unit in (*made.units, made.root) for p in unit.parameters]
    assert sorted(names) == sorted(n for n, _ in net.named_parameters())
    inner = next(u for u in made.units if u.path == "blocks.1.ffn")
    outer = next(u for u in made.units if u.path == "blocks.1")
    assert all(p.name.startswith("blocks.1.ffn.") for p in inner.parameters)
    assert all(p.name.startswith("blocks.1.attn.") for p in outer.parameters)


def test_units_run_in_the_policys_order_else_in_that_of_registration():
    policy = ShardingPolicy(units=("head", "blocks.{*}"))
    written = ("predictor.blocks.{0-1}", "predictor.head")
    assert [u.path for u in plan(policy, sub_modules_to_wrap=written).units] == [
        "head",
        "blocks.0",
        "blocks.1",
    ]
    assert [u.path for u in plan(sub_modules_to_wrap=written[::-1]).units] == ["blocks.0", "blocks.1", "head"]


def test_rows_give_the_bytes_of_the_fullest_rank_and_the_prefetch():
    made = plan(
        ShardingPolicy(units=("blocks.{*}", "head"), keep_gathered=("head",), recompute=("blocks.{*}.ffn",)),
        param_dtype="bf16",
        num_to_forward_prefetch=2,
    )
    rows = {row["unit"]: row for row in unit_rows(made, 4)}
    assert list(rows) == [
        "predictor.blocks.0",
        "predictor.blocks.1",
        "predictor.blocks.2",
        "predictor.head",
        "predictor",
    ]
    head = rows["predictor.head"]
    assert head["numel"] == 35
    assert head["bytes_per_rank"] == (2 * 6 + 2) * 4  # ceil(5 / 4) rows of 6, and 2 of the bias, in fp32
    assert head["gathered_bytes"] == 35 * 2
    assert head["dtype"] == "bf16"
    assert head["reshard"] is False
    assert rows["predictor.blocks.1"]["recompute"] == "ffn"
    assert rows["predictor.blocks.1"]["reshard"] is True
    assert rows["predictor.blocks.1"]["prefetch"] == ["predictor.blocks.2", "predictor.head"]
    assert rows["predictor"]["prefetch"] == ["predictor.blocks.0", "predictor.blocks.1"]
    assert rows["predictor"]["recompute"] == "no"
    assert sum(row["numel"] for row in rows.values()) == sum(p.numel() for p in Net().parameters())
    assert json.loads(json.dumps(made.as_dict(4)))["units"][3]["unit"] == "predictor.head"


@pytest.mark.parametrize(
    ("fsdp2", "message"),
    [
        ({"sub_modules_to_wrap": ("predictor.block.{*}",)}, "Closest: predictor.blocks"),
        ({"sub_modules_to_wrap": ("predicter.blocks.{*}",)}, "Closest: predictor.blocks.{*}"),
        ({"sub_modules_to_wrap": ("blocks.{*}",)}, "Closest: predictor.blocks.{*}"),
        (
            {"sub_modules_to_wrap": ("predictor.blocks",)},
            'is a ModuleList, which is never called itself; write "predictor.blocks.{*}"',
        ),
        (
            {"sub_modules_to_wrap": ("predictor.blocks.{*}", "predictor.blocks.1")},
            'claimed twice, by "predictor.blocks.{*}" and by "predictor.blocks.1"',
        ),
        ({"ignored_modules": ("ae", "predictor.head", "predictor.head")}, "stands there twice"),
        (
            {
                "sub_modules_to_wrap": (
                    "predictor.embed",
                    "predictor.blocks.0.ffn",
                    "predictor.blocks.0.ffn.{0,2}",
                )
            },
            'all parameters of "predictor.blocks.0.ffn" belong to units inside it',
        ),
        ({"sub_modules_to_wrap": ("predictor.blocks.0.ffn.1",)}, "has no parameters to shard"),
        ({"recompute_modules": ("predictor",)}, "is the whole model"),
        (
            {"recompute_modules": ("predictor.blocks.{*}", "predictor.blocks.0.attn")},
            "which is recomputed as a whole",
        ),
        ({"ignored_modules": ("predictor.embed",)}, "has trained parameters (weight)"),
        (
            {"ignored_modules": ("ae",), "recompute_modules": ("predictor.{embed,hed}",)},
            "Closest: predictor.head",
        ),
    ],
)
def test_what_cannot_be_is_a_user_error(fsdp2, message):
    with pytest.raises(PlanError) as caught:
        plan(**fsdp2)
    assert message in str(caught.value)
    assert caught.value.pattern in fsdp2[caught.value.field]


def test_an_error_names_the_pattern_as_the_file_has_it():
    policy = ShardingPolicy(units=("blocks.{*}",), aliases={"transformer": "blocks"})
    with pytest.raises(PlanError) as caught:
        plan(policy, recompute_modules=("predictor.head", "predictor.transformer.{0,7}"))
    assert (caught.value.field, caught.value.pattern) == ("recompute_modules", "predictor.transformer.{0,7}")
    with pytest.raises(PlanError) as caught:
        plan(policy, ignored_modules=("predictor.blocks.7",))
    assert (caught.value.field, caught.value.pattern) == ("ignored_modules", "predictor.blocks.7")


def test_an_error_of_a_policy_names_no_pattern_of_the_file():
    for policy in (ShardingPolicy(units=("bloks.{*}",)), ShardingPolicy(recompute=("blocks",))):
        with pytest.raises(PlanError) as caught:
            plan(policy, ignored_modules=("ae",))
        assert (caught.value.field, caught.value.pattern) == (None, None)


def test_a_unit_inside_an_ignored_module_is_refused():
    net = Net()
    net.blocks[0].requires_grad_(False)
    with pytest.raises(
        ShardingError, match=r'lies in "predictor\.blocks\.0", which ignored_modules leaves out'
    ):
        plan(net=net, ignored_modules=("predictor.blocks.0",))
    made = plan(
        net=net, ignored_modules=("predictor.blocks.0",), sub_modules_to_wrap=("predictor.blocks.{1-2}",)
    )
    assert made.ignored_parameters
    assert all(name.startswith("blocks.0.") for name in made.ignored_parameters)


def test_a_tensor_shared_between_units_is_refused_and_inside_one_is_fine():
    net = Net()
    net.blocks[1].attn.weight = net.blocks[0].attn.weight
    with pytest.raises(ShardingError, match="is the same tensor as"):
        plan(net=net)
    made = plan(net=net, sub_modules_to_wrap=())
    assert sum(u.numel for u in (*made.units, made.root)) == sum(p.numel() for p in net.parameters())


def test_layers_that_share_a_tensor_belong_to_the_root():
    net = Net()
    net.blocks[1].attn.weight = net.blocks[0].attn.weight
    policy = ShardingPolicy(units=("embed", "blocks.0.attn", "blocks.1.attn"))
    made = plan(net=net, policy=policy)
    assert [u.path for u in made.units] == ["embed"]
    assert {"blocks.0.attn.weight", "blocks.1.attn.bias"} <= {p.name for p in made.root.parameters}
    assert sum(u.numel for u in (*made.units, made.root)) == sum(p.numel() for p in net.parameters())


def test_a_block_that_stands_in_a_list_twice_is_one_unit():
    net = Net()
    net.blocks[1] = net.blocks[0]
    assert [u.path for u in plan(net=net).units] == ["blocks.0", "blocks.2"]


def test_roots_of_a_composite_take_their_own_patterns_and_the_others_are_checked():
    model = Composite(low=True)
    roots = {name: getattr(model, name) for name in ("predictor", "low_noise_predictor")}
    policies = {name: ShardingPolicy(units=("blocks.{*}",)) for name in roots}
    config = Fsdp2Config(sub_modules_to_wrap=("predictor.blocks.{0-1}",), ignored_modules=("text_encoder",))
    plans = build_plans(roots, policies, config, model)
    assert [u.path for u in plans["predictor"].units] == ["blocks.0", "blocks.1"]
    assert len(plans["low_noise_predictor"].units) == 3  # the file says nothing about it
    with pytest.raises(ShardingError, match="names a part that is not trained") as caught:
        build_plans(roots, policies, Fsdp2Config(recompute_modules=("text_encoder",)), model)
    assert (caught.value.field, caught.value.pattern) == ("recompute_modules", "text_encoder")
    with pytest.raises(UserError, match='lies in "text_encoder", which is not trained'):
        build_plans(roots, policies, Fsdp2Config(ignored_modules=("text_encoder.layers",)), model)


def test_an_absent_encoder_may_be_ignored_and_is_else_named_as_absent():
    model = Composite(encoder=False)
    roots, policies = {"predictor": model.predictor}, {"predictor": ShardingPolicy()}
    # Where features are stored no encoder is built, and the file that names it stays.
    build_plans(roots, policies, Fsdp2Config(ignored_modules=("text_encoder",)), model)
    with pytest.raises(ShardingError, match='this model has no "text_encoder"') as caught:
        build_plans(roots, policies, Fsdp2Config(recompute_modules=("text_encoder",)), model)
    assert "take the pattern out" in str(caught.value)


def test_sharding_sizes():
    assert shard_size(Fsdp2Config(), 6) == 6
    assert shard_size(Fsdp2Config(sharding_size="auto"), 6) == 6
    assert shard_size(Fsdp2Config(sharding_size=3), 6) == 3
    with pytest.raises(ShardingError, match=r"sharding_size: 4 does not divide the 6 .*one of 1, 2, 3, 6"):
        shard_size(Fsdp2Config(sharding_size=4), 6)
    with pytest.raises(ShardingError, match="reshard_after_forward: 4 does not divide the 6 ranks"):
        shard_size(Fsdp2Config(reshard_after_forward=4), 6)


def test_the_configuration_of_a_file(tmp_path):
    file = tmp_path / "fsdp2.yaml"
    file.write_text("sharding_size: auto\nsub_modules_to_wrap:\n  - predictor.blocks.{*}\n")
    assert load_fsdp2_config(file).sub_modules_to_wrap == ("predictor.blocks.{*}",)
    file.write_text("sharding_sise: auto\n")
    with pytest.raises(UserError, match="sharding_size"):
        load_fsdp2_config(file)
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load_fsdp2_config(tmp_path / "absent.yaml")
