"""Ranks whose micro batches need different modules issue the same collectives and learn what one process learns."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy, participation
from mm_core.sharding.participation import participation_of
from mm_core.sharding.plan import bare_name
from mm_core.training.step import UnusedParameters
from mm_core.weights import materialize
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.towers import IN_ORDER, Towers, loss_of, micro_batch

pytestmark = pytest.mark.timeout(180)

STEPS = 3
NEVER_USED = {"unused.weight", "unused.bias", "text.0.branches.2.weight", "vision.0.spare", "text.0.spare"}


class Grouped(Towers):
    """With a part of each block in one group."""

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        policy = dataclasses.replace(self.policy, aligned=("vision.{*}.down", "text.{*}.down"))
        return {"model": policy}


class Recorder(TorchDispatchMode):
    """The collectives of this process, in order: name and number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.seen.append((func.__name__, max(t.numel() for t in tensors)))
        return func(*args, **(kwargs or {}))


def whole(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().numpy()


def built(units: tuple[str, ...] = IN_ORDER, **fsdp2: Any) -> nn.Module:
    model = Towers(units)
    model.fully_shard(None, Fsdp2Config(**fsdp2))
    materialize(model.model, "cpu", 0)
    return model.model


def train(
    images: str, accumulation: int = 1, ranks: int = 0, frozen: tuple[str, ...] = (), **how: Any
) -> tuple[list[float], dict[str, Any]]:
    """Losses of the global batches and final weights; one process takes the parts of all `ranks`."""
    root = built(**how)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(not bare_name(name).startswith(frozen or ("-",)))
    parameters = {bare_name(n): p for n, p in root.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    unused = UnusedParameters([root], torch.device("cpu"))
    world = dist.get_world_size()
    mine = [dist.get_rank()] if world > 1 else range(ranks)
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(accumulation):
            for rank in mine:
                loss = loss_of(root, micro_batch(step, rank, micro, images))
                loss.backward()
                total += loss.detach()
        numbers = torch.cat([total.view(1), unused.numbers()])
        dist.all_reduce(numbers)
        unused.drop(numbers[1:])
        assert not unused.mismatch(numbers[1:])
        assert all(parameters[name].grad is None for name in NEVER_USED)
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(world / 64)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(numbers[0].item())
    return losses, {name: whole(p) for name, p in parameters.items()}


@functools.cache
def in_one_process(*args: Any) -> tuple[list[float], dict[str, Any]]:
    result: tuple[list[float], dict[str, Any]] = run_ranks(train, 1, *args)[0]
    return result


def same(images: str, world: int, accumulation: int = 1, frozen: tuple[str, ...] = (), **how: Any) -> None:
    losses, weights = in_one_process(images, accumulation, world, frozen)
    for got_losses, got in run_ranks(train, world, images, accumulation, 0, frozen, timeout=60, **how):
        assert got_losses == pytest.approx(losses, rel=1e-6)
        for name, expected in weights.items():
            np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len(set(losses)) == STEPS


ALL_BLOCKS = ("model.vision.{*}", "model.text.{*}")
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefetch 1": {"num_to_forward_prefetch": 1, "num_to_backward_prefetch": 1},
    "prefetch 2": {"num_to_forward_prefetch": 2, "num_to_backward_prefetch": 2},
    "recompute": {"recompute_modules": ALL_BLOCKS},
    "reentrant": {"recompute_modules": ALL_BLOCKS, "use_reentrant": True},
    "stay gathered": {"reshard_after_forward": False},
    "recompute and prefetch": {"recompute_modules": ALL_BLOCKS, "num_to_backward_prefetch": 2},
}


@pytest.mark.parametrize("how", list(HOW))
def test_one_rank_of_two_has_an_image(how: str) -> None:
    same("it", 2, **HOW[how])


@pytest.mark.parametrize("images", ["i", "t", "itt"])
def test_images_on_all_ranks_on_none_and_in_turn(images: str) -> None:
    same(images, 2)


@pytest.mark.parametrize(
    ("images", "how"),
    [
        ("ittt", {"num_to_forward_prefetch": 1}),
        ("itt", {"sharding_size": 2, "recompute_modules": ALL_BLOCKS}),
        ("tti", {"sharding_size": 1}),
        ("iitit", {"reshard_after_forward": 2}),
    ],
)
def test_four_ranks_and_replicas(images: str, how: dict[str, Any]) -> None:
    same(images, 4, **how)


@pytest.mark.parametrize("images", ["it", "itti"])
def test_another_mix_in_each_micro_batch(images: str) -> None:
    same(images, 2, accumulation=3, num_to_forward_prefetch=1)


@pytest.mark.parametrize(
    "frozen",
    [("vision", "patch"), ("vision", "patch", "mergers"), ("patch",), ("embed",), ("text", "embed")],
    ids=lambda names: "+".join(names),
)
def test_frozen_modules(frozen: tuple[str, ...]) -> None:
    """Which inputs have a gradient differs from case to case, and with it where the chain of gradients ends."""
    same("it", 2, frozen=frozen)


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.sharding.apply.every_rank_takes_part", lambda root, plan: None)


def test_without_it_the_ranks_do_not_understand_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    with pytest.raises(RankError):
        run_ranks(train, 2, "it", timeout=8)


def test_without_it_a_branch_that_one_rank_takes_learns_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    with pytest.raises((RankError, AssertionError)):
        same("i", 2)


def collectives(images: str, **how: Any) -> list[list[tuple[str, int]]]:
    """Of a training pass, of one without gradients, and of a training pass after it."""
    root = built(**how)
    lists = []
    for grad in (True, False, True):
        with Recorder() as recorder, torch.set_grad_enabled(grad):
            loss = loss_of(root, micro_batch(0, dist.get_rank(), 0, images))
            if grad:
                loss.backward()
        lists.append(recorder.seen)
    return lists


@pytest.mark.parametrize("how", ["plain", "prefetch 2", "recompute"])
def test_the_collectives_are_those_of_a_rank_that_runs_all(how: str) -> None:
    everything = run_ranks(collectives, 2, "i", **HOW[how])[0]
    assert any("reduce_scatter" in name for name, _ in everything[0])
    assert not any("reduce_scatter" in name for name, _ in everything[1])
    for lists in run_ranks(collectives, 2, "it", **HOW[how]):
        assert lists == everything


# Blocks first, as one would write them; but each merger runs after its block.
OUT_OF_ORDER = ("vision.{*}", "mergers.{*}", "text.{*}", "text.{*}.branches.{*}", "unused")


def learnt(images: str) -> Any:
    root = built(OUT_OF_ORDER)
    share, unused = participation_of(root), UnusedParameters([root], torch.device("cpu"))
    assert share is not None
    seen = []
    for step in range(2):
        with Recorder() as recorder:
            loss_of(root, micro_batch(step, dist.get_rank(), 0, images)).backward()
        seen.append((share.disorder, len(recorder.seen)))
        numbers = unused.numbers().clone()
        dist.all_reduce(numbers)
        assert not unused.mismatch(numbers)
    return seen


def test_another_order_than_the_plans_is_learnt_where_all_ranks_see_it() -> None:
    for (first, before), (second, after) in run_ranks(learnt, 2, "i"):
        assert first == ("vision.1", "mergers.0")
        assert second is None
        assert after < before  # nothing is gathered twice any more
    same("i", 2, units=OUT_OF_ORDER)


def told(passes: list[int]) -> bool:
    """Whether ranks are told that they found another order in these passes."""
    own = float(passes[dist.get_rank()])
    numbers = torch.tensor([1.0, own, own**2])
    dist.all_reduce(numbers)
    return bool(UnusedParameters.mismatch(numbers))


@pytest.mark.parametrize(
    ("passes", "mismatch"), [([0, 0], False), ([1, 1], False), ([0, 1], True), ([2, 1], True)]
)
def test_ranks_that_skip_what_others_run_in_another_order_are_told(passes: list[int], mismatch: bool) -> None:
    assert run_ranks(told, 2, passes) == [mismatch, mismatch]


def test_a_group_of_modules_that_a_micro_batch_skips_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is gathered and reduced depends on what runs: without the error ranks hang, or learn wrongly."""
    monkeypatch.setitem(globals(), "Towers", Grouped)
    how: dict[str, Any] = {"align_fsdp_param_groups": True, **HOW["reentrant"], **HOW["prefetch 2"]}
    same("i", 2, **how)
    for images in ("it", "t"):
        with pytest.raises(RankError, match=r"true gathers modules of vision\.0 together"):
            run_ranks(train, 2, images, timeout=30, **how)


def alone() -> bool:
    return participation_of(built(param_dtype="bf16")) is None


def test_one_rank_needs_nothing() -> None:
    assert run_ranks(alone, 1) == [True]
    assert participation_of(nn.Linear(1, 1)) is None
    assert participation.__doc__
