"""Qwen3-VL with images and videos: ranks that share sequences or tensors, or see other kinds of samples, learn what one
process of plain transformers learns.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.sharding import ShardingPolicy, build_plan
from mm_core.sharding.context import context_of, context_problem
from mm_core.sharding.context_items import Deal
from mm_core.sharding.context_policy import ContextPolicy, DealtItems
from mm_core.sharding.joint_vision import join_vision_calls
from mm_core.sharding.policy import policy_problem
from mm_core.sharding.prefetch import prefetch_lists
from mm_core.weights import materialize
from mm_core.weights.tensors import named_parameters
from mm_registry.errors import UserError
from tests import tiny_vlm
from tests.distributed.against_one import distance, whole
from tests.distributed.harness import run_ranks
from tests.distributed.models import Batch, Composite
from tests.distributed.vision_language import make, policy

pytestmark = pytest.mark.timeout(180)
Kinds = tuple[tuple[str, ...], ...]

MIXED: Kinds = (("two_images", "text"), ("video", "image"), ("text",), ("image", "video", "text"))
"""Micro batches of a step: with images, with both, with neither, with both."""
APART: Kinds = (("text", "text"), ("image", "two_images"), ("text",), ("video",))
"""On two ranks one sees texts alone, and the other images or videos alone."""
TEXTS: Kinds = (("text",), ("text", "text"))
VISION, TEXT = "model.visual", "model.language_model"


def losses_of(network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of this rank's tokens, and their number."""
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    arguments = {k: v for k, v in batch.items() if k not in ("labels", "sample_index")}
    logits = network(**arguments, use_cache=False).logits
    context = context_of(network)
    targets = targets if context is None else context.split(targets)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return losses, (targets >= 0).sum()


def learn(
    moe: bool, kinds: Kinds, sizes: ParallelSizes, frozen: str | None = None, **fsdp2: Any
) -> dict[str, Any]:
    """Mean loss and whole gradients of a global batch, whose micro batches are dealt out to ranks in turn."""
    composite = Composite(_meta(moe), policy(moe))
    network = composite.predictor
    if frozen:
        network.get_submodule(frozen).requires_grad_(False)
    composite.fully_shard(None, Fsdp2Config(**fsdp2), sizes)
    materialize(network, "cpu", 0)
    mesh, totals = composite.parallel_mesh, torch.zeros(2)
    for number in range(mesh.dp_rank, len(kinds), mesh.dp_size):
        loss, weight = losses_of(network, tiny_vlm.batch(*kinds[number], seed=number))
        (loss * mesh.fsdp.size()).backward()  # FSDP2 takes the mean of the ranks' gradients
        totals += torch.stack([loss.detach(), weight])
    dist.all_reduce(totals)
    totals /= sizes.tp  # whose ranks have the same losses
    gradients = {n: whole(p.grad) for n, p in named_parameters(network) if p.grad is not None}
    quotients = {name: gradient / totals[1].item() for name, gradient in gradients.items()}
    return {"loss": (totals[0] / totals[1]).numpy(), **quotients}


@functools.cache
def alone(moe: bool, kinds: Kinds, frozen: str | None = None) -> dict[str, Any]:
    """The same by transformers' own network, in this process and in fp64."""
    values = _meta(moe)
    materialize(values, "cpu", 0)
    network = make(moe)
    network.load_state_dict(values.state_dict())
    network = network.double()
    if frozen:
        network.get_submodule(frozen).requires_grad_(False)
    total, weights = torch.zeros((), dtype=torch.float64), 0
    for number, each in enumerate(kinds):
        loss, weight = losses_of(network, tiny_vlm.batch(*each, seed=number))
        total, weights = total + loss, weights + int(weight)
    (total / weights).backward()
    gradients = {n: p.grad.numpy() for n, p in network.named_parameters() if p.grad is not None}
    return {"loss": (total / weights).detach().numpy(), **gradients}


def _meta(moe: bool) -> nn.Module:
    with torch.device("meta"):
        return make(moe)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize(
    ("world", "sizes", "fsdp2"),
    [
        pytest.param(2, {"cp": 2}, {}, id="ulysses"),
        pytest.param(4, {"cp": 2, "cp_algo": "ring"}, {"recompute_granularity": "full"}, id="ring-2-of-4"),
        pytest.param(4, {"cp": 4, "cp_algo": "ring"}, {}, id="ring-4", marks=pytest.mark.slow),
        pytest.param(4, {"cp": 4}, {"sharding_size": 4}, id="ulysses-4", marks=pytest.mark.slow),
        pytest.param(2, {"tp": 2}, {}, id="tensor"),
        pytest.param(4, {"tp": 2, "cp": 2}, {}, id="tensor-ulysses", marks=pytest.mark.slow),
    ],
)
def test_ranks_share_images_and_videos(moe, world, sizes, fsdp2):
    found = run_ranks(learn, world, moe, MIXED, ParallelSizes(**sizes), **fsdp2)
    assert all(distance(each, alone(moe, MIXED)) < 2e-6 for each in found)


@pytest.mark.parametrize(
    ("moe", "world", "kinds", "frozen", "fsdp2"),
    [
        pytest.param(False, 2, APART, None, {"num_to_forward_prefetch": 2, "num_to_backward_prefetch": 2}, id="prefetch"),
        pytest.param(True, 2, APART, None, {"align_fsdp_param_groups": True, "expert_parallel_size": 2}, id="aligned-experts"),
        pytest.param(False, 2, APART, VISION, {"recompute_granularity": "full"}, id="frozen-vision"),
        pytest.param(False, 2, APART, TEXT, {}, id="frozen-text"),
        pytest.param(True, 4, APART, None, {"sharding_size": 2}, id="hsdp-moe", marks=pytest.mark.slow),
        pytest.param(True, 4, MIXED, VISION, {"expert_parallel_size": 4}, id="frozen-experts", marks=pytest.mark.slow),
        pytest.param(False, 2, TEXTS, None, {"reshard_after_forward": False}, id="no-images"),
    ],
)  # fmt: skip
def test_ranks_may_see_other_kinds_of_samples(moe, world, kinds, frozen, fsdp2):
    """Neither hangs, nor differs."""
    found = run_ranks(
        learn, world, moe, kinds, ParallelSizes(ep=fsdp2.get("expert_parallel_size", 1)), frozen, **fsdp2
    )[0]
    expected = alone(moe, kinds, frozen)
    # Ranks give zeros for what nobody used; the trainer takes them away again.
    unused = found.keys() - expected.keys()
    assert not any(found.pop(name).any() for name in unused)
    assert distance(found, expected) < 2e-6


def test_units_are_gathered_ahead_over_the_border_of_vision_and_text():
    plan = build_plan(
        _meta(True), policy(True), Fsdp2Config(num_to_forward_prefetch=2, num_to_backward_prefetch=2)
    )
    forward, backward = prefetch_lists(plan)
    assert forward[f"{VISION}.blocks.2"] == [f"{VISION}.deepstack_merger_list.1", f"{VISION}.merger"]
    assert forward[f"{VISION}.merger"] == [f"{TEXT}.embed_tokens", f"{TEXT}.layers.0"]
    assert backward[f"{TEXT}.layers.0"] == [f"{TEXT}.embed_tokens", f"{VISION}.merger"]
    assert forward[f"{TEXT}.layers.1"] == ["lm_head"]


def test_each_rank_looks_at_its_share_of_the_frames():
    """16 patches of an image, and two frames of 16 of a video; the tower runs once for both."""

    def run() -> list[int]:
        composite = Composite(_meta(False), policy(False))
        composite.fully_shard(None, Fsdp2Config(), ParallelSizes(cp=dist.get_world_size(), cp_algo="ring"))
        network = composite.predictor
        materialize(network, "cpu", 0)
        rows: list[int] = []
        network.model.visual.patch_embed.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        losses_of(network, tiny_vlm.batch("image", "video"))[0].backward()
        return rows

    assert run_ranks(run, 1) == [[48]]
    assert sorted(run_ranks(run, 3)) == [[16], [16], [16]]
    assert sorted(run_ranks(run, 2)) == [[16], [32]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 6))
def test_frames_are_dealt_out_in_order_and_evenly(frames, ranks):
    deal = Deal.of(frames, ranks)
    assert deal.bounds[0] == 0
    assert deal.bounds[-1] == len(frames)
    assert list(deal.bounds) == sorted(deal.bounds)
    assert sum(deal.sizes) == sum(frames)
    assert max(deal.sizes) <= sum(frames) / ranks + max(frames)
    for rank in range(ranks):
        first, last = deal.span(rank)
        assert first < last  # each rank runs the tower
        assert deal.sizes[rank] in (0, sum(frames[first:last]))


def test_a_grid_that_does_not_describe_the_pixels_is_an_error():
    def run() -> str:
        composite = Composite(_meta(False), policy(False))
        composite.fully_shard(None, Fsdp2Config(), ParallelSizes(cp=2))
        materialize(composite.predictor, "cpu", 0)
        batch = tiny_vlm.batch("image")
        batch["image_grid_thw"] = torch.tensor([[1, 4, 6]])
        try:
            losses_of(composite.predictor, batch)
        except UserError as error:
            return str(error)
        return "nothing raised"

    for said in run_ranks(run, 2):
        assert "predictor.model.visual: grid_thw describes 24 rows, but hidden_states has 16" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"split_marked": {"a": 1}},
            'split_marked: "a" has 1, expected a mapping from arguments to the argument',
        ),
        ({"split_marked": 3}, "split_marked is of type int"),
        ({"dealt": {"a": "grids"}}, 'dealt: "a" has "grids", expected a DealtItems'),
        ({"dealt": {"a": DealtItems("x", "y", outputs="z")}}, 'has the outputs "z", expected a tuple'),
    ],
)
def test_a_policy_that_cannot_be_meant_is_a_problem(changes, message):
    context = ContextPolicy(attention=("a",), split_outputs={"rope": 1}, **changes)
    assert message in str(policy_problem(ShardingPolicy(context=context)))


def test_styles_of_tensors_are_checked():
    assert policy_problem(ShardingPolicy(tensor={"a": "rowwise"})) is None
    said = policy_problem(ShardingPolicy(tensor={"a": "diagonal"}))
    assert said is not None
    assert said.startswith('tensor: "diagonal" is no style; use one of colwise, ')


def test_points_and_arguments_that_do_not_exist_are_named():
    network = _meta(False)
    own = policy(False)
    assert own.context is not None
    for changes, message in (
        ({"split_marked": {TEXT: {"deep": "visual_pos_masks"}}}, "none of which is deep"),
        (
            {"dealt": {VISION: DealtItems("pixels", "grid_thw", ("pooler_output",))}},
            "none of which is pixels",
        ),
    ):
        plan = build_plan(network, replace(own, context=replace(own.context, **changes)), Fsdp2Config())
        assert message in str(context_problem(network, plan, ParallelSizes(cp=2)))
    with pytest.raises(UserError, match=r"joint_vision: predictor.lm_head has no get_image_features"):
        join_vision_calls(network.lm_head, network.lm_head.forward, "predictor.lm_head")
    with pytest.raises(UserError, match=r"tensor: .*matches no module"):
        build_plan(network, replace(own, tensor={"model.head": "colwise"}), Fsdp2Config())
