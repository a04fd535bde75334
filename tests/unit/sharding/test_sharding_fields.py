"""Every field of a plan: what fsdp2.yaml, a flag, the policy and the default make of it, and which do not go together."""

from typing import Any

import pytest
import torch
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy, build_plan, build_plans
from mm_core.sharding.fitness import check_plan
from mm_core.sharding.patterns import CombinedPlanError, PlanError, class_name
from mm_core.sharding.plan import ALIGNED, ShardingError, ShardingPlan, Unit


class Experts(nn.Module):
    """As transformers 5 has them: all experts in two tensors."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(experts, 6, 8))
        self.down = nn.Parameter(torch.zeros(experts, 8, 6))

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x


class Layer(nn.Module):
    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.attn = nn.Linear(6, 6)
        self.router = nn.Linear(6, experts)
        self.experts = Experts(experts)
        self.out = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Moe(nn.Module):
    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList(Layer(experts) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


POLICY = ShardingPolicy(
    units=("layers.{*}", "head"), experts=("layers.{*}.experts",), aligned=("norm", "layers.{*}.norm")
)


def plan(policy: ShardingPolicy = POLICY, net: nn.Module | None = None, **fsdp2: Any) -> ShardingPlan:
    with torch.device("meta"):
        net = net or Moe()
    made = build_plan(net, policy, Fsdp2Config(**fsdp2))
    check_plan(made, net)
    return made


def paths(made: ShardingPlan) -> list[str]:
    return [unit.path for unit in made.units]


# -- recompute ----------------------------------------------------------------------------------------------------------

LAYERS = ("layers.0", "layers.1", "layers.2")


@pytest.mark.parametrize(
    ("policy", "fsdp2", "expected", "source"),
    [
        ({}, {}, (), "default"),
        ({"recompute": ("layers.{*}.attn",)}, {}, tuple(f"{path}.attn" for path in LAYERS), "policy"),
        ({}, {"recompute_granularity": "full"}, (*LAYERS, "head"), "units"),
        ({"recompute_granularity": "selective"}, {}, (*LAYERS, "head"), "units"),
        ({"recompute": ("layers.{*}",)}, {"recompute_granularity": "full"}, LAYERS, "policy"),
        ({}, {"recompute_granularity": "full", "recompute_num_layers": 2}, LAYERS[:2], "units"),
        ({"recompute": ("layers.{*}",)}, {"recompute_num_layers": 1}, LAYERS[:1], "policy"),
        ({"recompute": ("layers.{*}",)}, {"recompute_modules": ()}, (), "fsdp2.yaml"),
        ({"recompute": ("layers.{*}",)}, {"recompute_modules": ("predictor.head",)}, ("head",), "fsdp2.yaml"),
        (
            {},
            {"recompute_modules": ("predictor.layers.{*}",), "recompute_num_layers": 9},
            LAYERS,
            "fsdp2.yaml",
        ),
        ({}, {"recompute_granularity": "full", "recompute_modules": ()}, (), "fsdp2.yaml"),
    ],
)
def test_which_modules_are_recomputed(policy, fsdp2, expected, source):
    made = plan(ShardingPolicy(units=("layers.{*}", "head"), **policy), **fsdp2)
    assert made.recompute == expected
    assert made.sources["recompute_modules"] == source


def test_all_units_are_the_outermost_ones_without_experts_and_the_aligned_group():
    units = {"sub_modules_to_wrap": ("predictor.layers.{*}", "predictor.layers.{*}.attn")}
    made = plan(**units, recompute_granularity="full", expert_parallel_size=2, align_fsdp_param_groups=True)
    assert made.recompute == LAYERS
    assert "layers.0.attn" in paths(made)


def test_granularity_and_form():
    assert plan().recompute_granularity == "full"
    selective = ShardingPolicy(recompute_granularity="selective")
    assert plan(selective).recompute_granularity == "selective"
    assert plan(selective, recompute_granularity="full").recompute_granularity == "full"
    with pytest.raises(ShardingError, match=r"use_reentrant: true cannot recompute selectively") as caught:
        plan(selective, use_reentrant=True)
    assert (caught.value.field, caught.value.pattern) == ("use_reentrant", None)
    assert plan(selective, use_reentrant=True, recompute_modules=()).use_reentrant  # nothing is recomputed


def test_a_number_of_layers_of_nothing_is_an_error():
    with pytest.raises(ShardingError, match="recompute_num_layers: 2 has nothing to count"):
        plan(recompute_num_layers=2)


# -- offload ------------------------------------------------------------------------------------------------------------


def test_offloaded_modules_take_prefix_aliases_and_the_policys_place():
    policy = ShardingPolicy(units=("layers.{*}",), offload_activations=("layers.{*}",), aliases={"h": "head"})
    assert plan(policy).offload_activations == LAYERS
    assert plan(policy).sources["offload_activations"] == "policy"
    assert plan(policy, offload_activations=()).offload_activations == ()
    made = plan(policy, offload_activations=("predictor.h", "predictor.layers.{0-1}"))
    assert made.offload_activations == ("head", "layers.0", "layers.1")
    both = plan(policy, recompute_modules=("predictor.layers.{*}", "predictor.head"))
    assert both.offload_activations == both.recompute[:3] == LAYERS
    inside = plan(policy, recompute_modules=("predictor.layers.{*}.attn",))
    assert inside.recompute[0] == "layers.0.attn"


# -- experts ------------------------------------------------------------------------------------------------------------


def test_experts_are_units_of_their_own_inside_the_block():
    made = plan(expert_parallel_size=2, reshard_local_experts=False)
    assert paths(made) == [p for layer in LAYERS for p in (layer, f"{layer}.experts")] + ["head"]
    assert made.experts == tuple(f"{layer}.experts" for layer in LAYERS)
    assert (made.expert_parallel_size, made.reshard_local_experts) == (2, False)
    assert made.sources["moe_modules"] == "policy"
    experts = next(unit for unit in made.units if unit.path == "layers.1.experts")
    assert [p.name for p in experts.parameters] == ["layers.1.experts.up", "layers.1.experts.down"]
    assert not any("experts" in p.name for p in made.units[0].parameters)


@pytest.mark.parametrize("size", [1, None])
def test_one_rank_a_layer_distributes_no_experts(size):
    made = plan(expert_parallel_size=size, moe_modules=("predictor.not.there",))
    assert (made.experts, made.expert_parallel_size, paths(made)) == ((), 1, [*LAYERS, "head"])


def test_experts_stand_after_the_units_that_run_before_them():
    policy = ShardingPolicy(
        units=("layers.{*}", "layers.{*}.attn", "layers.{*}.out", "head"), experts=("layers.{*}.experts",)
    )
    by_policy = paths(plan(policy, expert_parallel_size=2))
    assert (
        by_policy.index("layers.0.attn")
        < by_policy.index("layers.0.experts")
        < by_policy.index("layers.0.out")
    )
    written = tuple(f"predictor.{unit}" for unit in policy.units[::-1])
    by_registration = plan(
        ShardingPolicy(experts=policy.experts), sub_modules_to_wrap=written, expert_parallel_size=2
    )
    inner = ("", ".attn", ".experts", ".out")
    assert paths(by_registration) == [*(f"{layer}{name}" for layer in LAYERS for name in inner), "head"]


def test_experts_without_a_unit_around_them():
    made = plan(ShardingPolicy(units=("head",), experts=("layers.{*}.experts",)), expert_parallel_size=4)
    assert paths(made) == [*(f"{layer}.experts" for layer in LAYERS), "head"]


# -- the aligned group --------------------------------------------------------------------------------------------------


def test_aligned_modules_are_one_unit_that_stays_gathered():
    made = plan(align_fsdp_param_groups=True)
    assert paths(made) == ["layers.0", ALIGNED, "layers.1", "layers.2", "head"]
    group = made.units[1]
    assert group.keep_gathered
    assert {p.name.rpartition(".")[0] for p in group.parameters} == {"norm", *(f"{p}.norm" for p in LAYERS)}
    assert made.aligned == ("norm", *(f"{path}.norm" for path in LAYERS))
    assert not any(".norm." in p.name for p in (*made.units[0].parameters, *made.root.parameters))
    assert plan().aligned == ()


def test_a_policy_may_ask_for_the_group_and_the_file_may_refuse_it():
    policy = ShardingPolicy(aligned=("norm",), align_fsdp_param_groups=True)
    assert plan(policy).aligned == ("norm",)
    assert plan(policy, align_fsdp_param_groups=False).aligned == ()


# -- settings -----------------------------------------------------------------------------------------------------------


def test_a_setting_comes_from_the_file_else_from_the_policy_else_from_the_default():
    policy = ShardingPolicy(
        reshard_after_forward=False,
        param_dtype="bf16",
        output_dtype="fp32",
        num_to_forward_prefetch=2,
        num_to_backward_prefetch=1,
    )
    made = plan(policy, param_dtype=None, num_to_forward_prefetch=0)
    assert made.reshard_after_forward is False
    assert made.param_dtype is None  # null is written, and means the parameters' own
    assert made.output_dtype == torch.float32
    assert (made.forward_prefetch, made.backward_prefetch) == (0, 1)
    sources = made.sources
    assert (sources["param_dtype"], sources["output_dtype"], sources["reduce_dtype"]) == (
        "fsdp2.yaml",
        "policy",
        "default",
    )
    assert sources["num_to_forward_prefetch"] == "fsdp2.yaml"


def test_what_a_flag_fills_is_said_to_come_from_it():
    config = Fsdp2Config(reshard_after_forward=False).filled({"param_dtype": "bf16"}, "--bf16")
    config = config.filled({"recompute_granularity": "full"}, "--recompute-granularity")
    made = build_plan(Moe(), POLICY, config)
    assert made.param_dtype == torch.bfloat16
    assert {made.sources[k] for k in ("param_dtype", "recompute_granularity", "reshard_after_forward")} == {
        "--bf16",
        "--recompute-granularity",
        "fsdp2.yaml",
    }


# -- conflicts ----------------------------------------------------------------------------------------------------------

CONFLICTS = [
    ({"offload_activations": ("predictor.layers.{*}", "predictor.layers.1.attn")}, {}, "offload_activations",
     'lies in "predictor.layers.1", whose activations are offloaded as a whole'),
    ({"offload_activations": ("predictor.layer",)}, {}, "offload_activations", "Closest: predictor.layers"),
    ({"offload_activations": ("predictor.layers",)}, {}, "offload_activations", 'write "predictor.layers.{*}"'),
    ({"offload_activations": ("predictor.head", "predictor.hea{d}")}, {}, "offload_activations", "claimed twice"),
    ({"moe_modules": ("predictor.layers.{*}.expert",)}, {"expert_parallel_size": 2}, "moe_modules",
     "Closest: predictor.layers.0.experts"),
    ({"moe_modules": ()}, {"expert_parallel_size": 2}, "expert_parallel_size", "has nothing to distribute"),
    ({"moe_modules": ("predictor.layers.{*}.experts",)}, {"expert_parallel_size": 3}, "moe_modules",
     "holds 4 experts, which expert_parallel_size 3 does not divide; use one of 1, 2, 4"),
    ({"moe_modules": ("predictor.layers.{*}",)}, {"expert_parallel_size": 2}, "moe_modules",
     "do not agree on a number of experts"),
    ({"sub_modules_to_wrap": ("predictor.layers.{*}.norm", "predictor.layers.{*}")},
     {"align_fsdp_param_groups": True}, "align_fsdp_param_groups", "is a unit itself"),
    ({"ignored_modules": ("predictor.layers.0.experts",)}, {}, "ignored_modules", "has trained parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("patterns", "settings", "field", "message"), CONFLICTS)
def test_what_does_not_go_together(patterns, settings, field, message):
    with pytest.raises(PlanError) as caught:
        plan(**patterns, **settings)
    errors = caught.value.errors if isinstance(caught.value, CombinedPlanError) else (caught.value,)
    assert any(message in str(error) for error in errors), str(caught.value)
    assert {error.field for error in errors} == {field}
    for error in errors:
        assert error.pattern is None or error.pattern in patterns[field]


def test_nothing_else_claims_what_is_inside_experts():
    class Deep(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

    net = Moe()
    net.layers[0].experts = Deep()
    for field in ("sub_modules_to_wrap", "recompute_modules", "offload_activations"):
        with pytest.raises(PlanError, match="whose experts are distributed over ranks as a whole"):
            plan(net=net, expert_parallel_size=2, **{field: ("predictor.layers.0.experts.inner",)})
    made = plan(expert_parallel_size=2, recompute_modules=("predictor.layers.0.experts",))
    assert made.recompute == ("layers.0.experts",)
    named = plan(ShardingPolicy(units=("layers.{*}", "layers.{*}.experts"), experts=("layers.{*}.experts",)),
                 expert_parallel_size=2)  # fmt: skip
    assert paths(named).count("layers.0.experts") == 1


def test_a_group_that_leaves_a_unit_empty_is_refused():
    policy = ShardingPolicy(units=("head", "layers.{*}"), aligned=("layers.{*}.norm", "layers.{*}.attn"))
    net = Moe()
    for layer in net.layers:
        del layer.router, layer.experts, layer.out
    with pytest.raises(
        PlanError, match=r'went to the group of align_fsdp_param_groups, "predictor\.\(aligned\)"'
    ):
        plan(policy, net, align_fsdp_param_groups=True)


@pytest.mark.parametrize(
    ("aligned", "message"),
    [
        ((), "names no norms or gates"),
        (("layers.{*}",), "is a unit itself"),
        (("layers.0.norm", "layers.0.nor{m}"), "claimed twice"),
        (("nurm",), "Closest: predictor.norm"),
    ],
)
def test_groups_that_cannot_be(aligned, message):
    with pytest.raises(PlanError) as caught:
        plan(ShardingPolicy(units=("layers.{*}",), aligned=aligned), align_fsdp_param_groups=True)
    assert message in str(caught.value)


# -- all at once --------------------------------------------------------------------------------------------------------


def test_all_wrong_patterns_are_told_at_once():
    with pytest.raises(CombinedPlanError) as caught:
        plan(
            sub_modules_to_wrap=("predictor.layers.{0-7}", "predictor.head", "predictr.embed"),
            recompute_modules=("predictor.layers.{*}", "predictor.nothing"),
            offload_activations=("predictor.layers.{*}.atn",),
        )
    assert [(e.field, e.pattern) for e in caught.value.errors] == [
        ("sub_modules_to_wrap", "predictr.embed"),
        ("sub_modules_to_wrap", "predictor.layers.{0-7}"),
        ("recompute_modules", "predictor.nothing"),
        ("offload_activations", "predictor.layers.{*}.atn"),
    ]
    assert str(caught.value).count("\n") == 3


def test_modules_that_cannot_be_units_are_told_at_once_too():
    with pytest.raises(CombinedPlanError) as caught:
        plan(recompute_modules=("predictor.layers", "predictor"), ignored_modules=("predictor.embed",))
    assert [e.pattern for e in caught.value.errors] == ["predictor.embed", "predictor.layers", "predictor"]


def test_only_paths_that_exist_are_suggested():
    net = Moe()
    known = {f"predictor.{name}" for name, _ in net.named_modules() if name} | {"predictor", "ae", ""}
    known |= {class_name(type(module)) for module in net.modules()} | {"predictor.layers.{*}"}
    for pattern in (
        "model.layers",
        "layers.{*}",
        "predicto.layers",
        "predicto.nothing",
        "zzz",
        "embed.0",
        "a.Layer",
    ):
        with pytest.raises(ShardingError) as caught:
            plan(net=net, recompute_modules=(pattern,))
        suggested = caught.value.suggestion.removeprefix("Closest: ").removesuffix(".").split(", ")
        assert set(suggested) <= known, pattern
    assert "predictor.layers" in suggested or f"{__name__}.Layer" in suggested


# -- classes ------------------------------------------------------------------------------------------------------------

FULL = f"{__name__}.Layer"


@pytest.mark.parametrize("pattern", [FULL, "Layer", "predictor.Layer", "their.package.Block"])
def test_units_by_the_name_of_their_class(pattern):
    policy = ShardingPolicy(aliases={"their.package.Block": "layers.{*}"})
    made = plan(policy, sub_modules_to_wrap=(pattern,))
    assert paths(made) == list(LAYERS)
    assert made.sources["sub_modules_to_wrap"] == "fsdp2.yaml"


def test_a_class_in_a_composite_belongs_to_the_parts_that_have_it():
    model = nn.Module()
    model.predictor, model.low_noise_predictor = Moe(), Moe()
    model.low_noise_predictor.layers = nn.ModuleList([nn.GELU(), nn.GELU()])
    model.text_encoder = nn.Sequential(nn.Embedding(2, 2)).requires_grad_(False)
    roots = {name: getattr(model, name) for name in ("predictor", "low_noise_predictor")}
    policies = dict.fromkeys(roots, ShardingPolicy(units=("head",)))

    def plans(**fsdp2: Any) -> dict[str, ShardingPlan]:
        return build_plans(roots, policies, Fsdp2Config(**fsdp2), model)

    made = plans(sub_modules_to_wrap=("Layer",), ignored_modules=("torch.nn.modules.sparse.Embedding",))
    assert paths(made["predictor"]) == list(LAYERS)
    assert paths(made["low_noise_predictor"]) == ["head"]
    with pytest.raises(ShardingError, match='"Embedding" names a part that is not trained') as caught:
        plans(recompute_modules=("Embedding",))
    assert caught.value.pattern == "Embedding"
    with pytest.raises(
        PlanError, match=r'"Embeding" matches no module.*Closest: torch\.nn\.modules\.sparse\.Embedding'
    ):
        plans(recompute_modules=("Embeding",))


# -- the check of a finished plan ---------------------------------------------------------------------------------------


def test_a_finished_plan_is_checked_without_training():
    net, made = Moe(), plan(net=Moe())
    check_plan(made, net, ranks=8, shards=4)
    first, *others = made.units
    broken = {
        "is in no unit": Unit(first.path, first.parameters[1:]),
        "is in several units": Unit(first.path, (*first.parameters, made.root.parameters[0])),
        "but not in that module": Unit("layers.1", first.parameters),
        "is a unit of the plan, and no module": Unit("layers.9", ()),
    }
    for message, unit in broken.items():
        changed = ShardingPlan("predictor", (unit, *others), made.root)
        with pytest.raises(PlanError, match=message):
            check_plan(changed, net)
    inner = Unit("layers.0.attn", tuple(p for p in first.parameters if ".attn." in p.name))
    outer = Unit("layers.0", tuple(p for p in first.parameters if ".attn." not in p.name))
    check_plan(ShardingPlan("predictor", (outer, inner, *others), made.root), net)
    with pytest.raises(PlanError, match=r'"predictor\.layers\.0\.attn" comes before "predictor\.layers\.0"'):
        check_plan(ShardingPlan("predictor", (inner, outer, *others), made.root), net)


@pytest.mark.parametrize(
    ("fsdp2", "ranks", "shards", "message"),
    [
        ({"reshard_after_forward": 3}, 8, 4, r"does not divide the 4 ranks .* one of 2, 4"),
        (
            {"expert_parallel_size": 4},
            6,
            6,
            r"does not divide the 6 data-parallel ranks; use one of 1, 2, 3, 6",
        ),
        ({"expert_parallel_size": 4}, 12, 6, r"do not fit into the 6 ranks of sharding_size"),
    ],
)
def test_numbers_that_do_not_divide_the_ranks(fsdp2, ranks, shards, message):
    made, net = plan(**fsdp2), Moe()
    with pytest.raises(ShardingError, match=message):
        check_plan(made, net, ranks=ranks, shards=shards)
    check_plan(made, net)
