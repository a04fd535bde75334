"""A sharded model trains as one process does, whatever the plan."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.sharding import ShardingPolicy
from mm_core.sharding.plan import ShardingError
from mm_core.weights import materialize
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import Composite, loss_of, sharded, train_from_scratch

pytestmark = pytest.mark.timeout(180)
STEPS = 5
BLOCKS = ("predictor.blocks.{*}",)


@pytest.fixture(scope="module")
def one_rank() -> tuple[list[float], dict[str, Any]]:
    """The reference: one process, nothing sharded."""
    return run_ranks(train_from_scratch, 1, STEPS)[0]


def relative_distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float(np.square(a[name] - b[name], dtype=np.float64).sum()) for name in a)
    return (difference / sum(float(np.square(b[name], dtype=np.float64).sum()) for name in b)) ** 0.5


@pytest.mark.parametrize(
    ("world", "fsdp2"),
    [
        pytest.param(1, {"recompute_modules": BLOCKS}, id="1-recompute"),
        pytest.param(2, {}, id="2"),
        pytest.param(
            2, {"recompute_modules": BLOCKS, "num_to_forward_prefetch": 2}, id="2-recompute-prefetch"
        ),
        pytest.param(
            2, {"reshard_after_forward": False, "num_to_backward_prefetch": 1}, id="2-keep-gathered"
        ),
        pytest.param(2, {"sharding_size": 1}, id="2-replicated"),
        pytest.param(2, {"sub_modules_to_wrap": (), "ignored_modules": ("ae",)}, id="2-root-only"),
        pytest.param(2, {"offload_to_cpu": True, "pin_memory": True}, id="2-offload"),
        pytest.param(4, {}, id="4", marks=pytest.mark.slow),
        pytest.param(4, {"sharding_size": 2}, id="4-hsdp-2x2"),
        pytest.param(4, {"reshard_after_forward": 2}, id="4-reshard-to-2", marks=pytest.mark.slow),
        pytest.param(
            2, {"recompute_modules": BLOCKS, "use_reentrant": True}, id="2-reentrant", marks=pytest.mark.slow
        ),
    ],
)
def test_same_losses_and_weights_as_one_process(world, fsdp2, one_rank):
    losses, weights = run_ranks(train_from_scratch, world, STEPS, **fsdp2)[0]
    np.testing.assert_allclose(losses, one_rank[0], rtol=1e-5)
    assert relative_distance(weights, one_rank[1]) < 1e-5


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_compute_stays_near_fp32_and_keeps_fp32_weights(world, one_rank):
    losses, weights = run_ranks(train_from_scratch, world, STEPS, param_dtype="bf16", reduce_dtype="fp32")[0]
    np.testing.assert_allclose(losses, one_rank[0], rtol=2e-2)
    assert losses != one_rank[0]  # it did compute in bf16
    assert all(value.dtype == np.float32 for value in weights.values())


def test_one_rank_in_fp32_is_not_wrapped_but_its_plan_is_there():
    def look() -> tuple[bool, bool, int, bool]:
        plain, cast = sharded(), sharded(param_dtype="bf16")
        return (
            isinstance(plain.predictor, FSDPModule),
            isinstance(cast.predictor, FSDPModule),
            len(plain.sharding_plans["predictor"].units),
            plain.sharding_plans["predictor"] == sharded().sharding_plans["predictor"],
        )

    assert run_ranks(look, 1) == [(False, True, 4, True)]


def test_timestep_and_rope_stay_fp32_in_bf16_compute():
    def dtypes() -> dict[str, torch.dtype]:
        model = sharded(param_dtype="bf16", output_dtype="fp32")
        seen: dict[str, torch.dtype] = {}
        predictor = model.predictor
        predictor.condition_embedder.register_forward_pre_hook(
            lambda _, a: seen.update(timestep=a[0].dtype, text=a[1].dtype)
        )
        predictor.blocks[1].register_forward_pre_hook(
            lambda _, a: seen.update(hidden=a[0].dtype, rope=a[3][0].dtype)
        )
        predictor.register_forward_hook(lambda _, a, out: seen.update(output=out[0].dtype))
        loss_of(predictor, 0).backward()
        return {name: str(dtype) for name, dtype in seen.items()}

    fp32, bf16 = "torch.float32", "torch.bfloat16"
    expected = {"timestep": fp32, "text": bf16, "hidden": bf16, "output": fp32}
    seen = run_ranks(dtypes, 2)[0]
    rope = seen.pop("rope")
    assert seen == expected
    assert rope != bf16


def test_frozen_modules_that_are_ignored_stay_whole(one_rank):
    def look() -> tuple[list[str], float]:
        model = Composite()
        model.predictor.condition_embedder.text_embedder.requires_grad_(False)
        model.fully_shard(
            None, Fsdp2Config(ignored_modules=("ae", "predictor.condition_embedder.text_embedder"))
        )
        materialize(model.predictor, "cpu", 0)
        plain = [n for n, p in model.predictor.named_parameters() if type(p) is torch.nn.Parameter]
        loss = loss_of(model.predictor, 0)
        loss.backward()
        torch.distributed.all_reduce(loss.detach())
        return plain, loss.item() / 2

    names, loss = run_ranks(look, 2)[0]
    assert names
    assert all(name.startswith("condition_embedder.text_embedder.") for name in names)
    assert loss == pytest.approx(one_rank[0][0], rel=1e-5)


def test_an_overridden_fully_shard_is_read_back_and_checked():
    from torch.distributed.fsdp import fully_shard

    class Own(Composite):
        def _fully_shard(self, fsdp2_kwargs: dict[str, Any], fsdp2_config: Fsdp2Config) -> None:
            fully_shard(self.predictor.blocks[0], **fsdp2_kwargs)
            fully_shard(self.predictor, **fsdp2_kwargs)

    class Forgets(Composite):
        def _fully_shard(self, fsdp2_kwargs: dict[str, Any], fsdp2_config: Fsdp2Config) -> None:
            fully_shard(self.predictor.blocks[0], **fsdp2_kwargs)

    def run() -> tuple[list[str], int, str]:
        own = Own()
        own.fully_shard(None, None)
        plan = own.sharding_plans["predictor"]
        try:
            Forgets().fully_shard(None, None)
        except ShardingError as error:
            return [u.path for u in plan.units], len(plan.root.parameters), str(error)
        return [], 0, "nothing raised"

    units, rest, message = run_ranks(run, 2)[0]
    total = len(list(Composite().predictor.parameters()))
    in_block = len(list(Composite().predictor.blocks[0].parameters()))
    assert units == ["blocks.0"]
    assert rest == total - in_block
    assert "its root is no FSDP module" in message


def test_a_part_with_its_own_fully_shard_is_asked_first():
    from mm_core.sharding import FSDP2Mixin
    from tests.distributed.tiny import SIZES, TinyWan

    class Part(TinyWan, FSDP2Mixin):
        def sharding_roots(self) -> dict[str, ShardingPolicy]:
            return {"": ShardingPolicy(units=("blocks.{0-1}",))}

    def run() -> list[str]:
        model = Composite()
        with torch.device("meta"):
            model.predictor = Part(**SIZES)
        model.fully_shard(None, Fsdp2Config(ignored_modules=("ae",)))
        return [unit.path for unit in model.sharding_plans["predictor"].units]

    assert run_ranks(run, 2)[0] == ["blocks.0", "blocks.1"]
