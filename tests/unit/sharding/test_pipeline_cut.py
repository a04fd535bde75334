"""What is cut of a model for a pipeline stage, and what cannot be cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.sharding import ShardingPolicy, build_plan
from mm_core.sharding.pipeline import cut_for, pipeline_problem, stages_of, tensors_elsewhere
from mm_core.sharding.policy import PipelinePolicy, policy_problem
from mm_plugin_wan22.policy import WANDIT
from mm_plugin_wan22.predictor import WanDiT

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_heads": 2,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 32,
    "text_len": 8,
    "num_layers": 4,
    "in_dim": 4,
    "out_dim": 4,
    "max_seq_len": 16,
}


def plan_of(root: nn.Module, policy: ShardingPolicy = WANDIT, **fsdp2: Any) -> Any:
    return build_plan(root, policy, Fsdp2Config(**fsdp2))


def wan(**sizes: Any) -> Any:
    with torch.device("meta"):
        return WanDiT(**{**SIZES, **sizes})


@pytest.mark.parametrize("sizes", [ParallelSizes(pp=3), ParallelSizes(pp=2, vpp=2)], ids=str)
def test_stages_share_the_names_and_the_plan_of_the_whole(sizes: ParallelSizes) -> None:
    names = set(wan().state_dict())
    whole_plan = plan_of(wan(), recompute_granularity="full", sub_modules_to_wrap=["predictor.blocks.{0-3}"])
    parameters: set[str] = set()
    units: list[str] = []
    recompute: list[str] = []
    blocks: dict[int, tuple[str, ...]] = {}
    for rank in range(sizes.pp):
        root: Any = wan()
        plan = cut_for(root, plan_of(root, recompute_granularity="full"), sizes, rank)
        own = set(root.state_dict())
        assert own == plan.parameter_names
        assert tensors_elsewhere(root) == names - own
        assert not own & parameters
        parameters |= own
        units += [unit.path for unit in plan.units]
        recompute += plan.recompute
        stages = stages_of(root)
        assert stages is not None
        blocks |= {part.index: part.blocks for part in stages.parts}
    assert parameters == names
    assert sorted(units) == [unit.path for unit in whole_plan.units]
    assert sorted(recompute) == sorted(whole_plan.recompute)
    assert [name for index in sorted(blocks) for name in blocks[index]] == ["0", "1", "2", "3"]


def refused(
    sizes: ParallelSizes, policy: ShardingPolicy = WANDIT, root: Any = None, **fsdp2: Any
) -> str | None:
    root = wan() if root is None else root
    return pipeline_problem(root, plan_of(root, policy, **fsdp2), sizes)


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    two = ParallelSizes(pp=2)
    assert refused(two) is None
    assert "does not say where it can be cut" in str(refused(two, replace(WANDIT, pipeline=None)))
    assert "does not go with --tensor-model-parallel-size 2" in str(refused(replace(two, tp=2)))
    assert refused(replace(two, cp=2)) is None
    assert "does not go with --expert-model-parallel-size 2" in str(refused(replace(two, ep=2)))
    assert "makes 5 stages of 4 blocks" in str(refused(ParallelSizes(pp=5)))
    assert "adds up to 3" in str(refused(ParallelSizes(pp=2, layers=((2, 1),))))
    interleaved = ParallelSizes(pp=2, vpp=2)
    assert refused(interleaved) is None
    assert "write false" in str(refused(interleaved, align_fsdp_param_groups=True))


def test_a_policy_that_does_not_fit_is_refused_by_name() -> None:
    two = ParallelSizes(pp=2)

    def policy(**changes: Any) -> ShardingPolicy:
        assert WANDIT.pipeline is not None
        return replace(WANDIT, pipeline=replace(WANDIT.pipeline, **changes))

    assert "scale_shift_table belongs to no stage" in str(refused(two, policy(last=("proj_out",))))
    assert '"head" is neither' in str(refused(two, policy(last=("head",))))
    assert 'blocks "layers" is no module' in str(refused(two, policy(blocks="layers")))
    plain = nn.Sequential(nn.Linear(2, 2))
    cannot = ShardingPolicy(pipeline=PipelinePolicy("0"))
    root = wan()
    root.stage_boundary = lambda *inputs, dtype: ()
    assert "takes no share of a sequence" in str(refused(replace(two, cp=2), root=root))
    assert "has no method stage_boundary" in str(refused(two, cannot, plain))


def test_a_tensor_of_two_stages_is_refused() -> None:
    root = wan(hidden_size=96, text_dim=96)
    root.condition_embedder.text_embedder.linear_2.bias = root.blocks[3].ffn.net[2].bias
    said = refused(
        ParallelSizes(pp=2), replace(WANDIT, units=()), root, sub_modules_to_wrap=["predictor.blocks.{0-2}"]
    )
    assert "is the same tensor as" in str(said)


def test_a_policy_of_wrong_types_is_refused() -> None:
    wrong: Any = {"blocks": "blocks"}
    assert "expected a PipelinePolicy" in str(policy_problem(ShardingPolicy(pipeline=wrong)))
    text: Any = "proj_out"
    said = policy_problem(ShardingPolicy(pipeline=PipelinePolicy("blocks", last=text)))
    assert said == 'pipeline: last: "proj_out" is one text, expected a tuple of them; write ("proj_out",)'
