"""What `mm plan` says ranks send, against what FSDP2 sends in a real step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mm_core.config.parallel import ParallelSizes
from mm_core.planning.collectives import step_collectives
from mm_core.training.step import GradientExchange
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import loss_of, sharded
from tests.unit.planning.made import costs

pytestmark = pytest.mark.timeout(120)

_KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}
Sent = dict[str, tuple[int, float]]


class Sending(TorchDispatchMode):
    """Counts collectives and the bytes that a ring of each sends."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = _KINDS[func._opname]
            self.count[kind] += 1
            if kind == "all-reduce":
                (tensor,), group = args[0], args[1]
                ranks = dist.ProcessGroup.unbox(group).size()
                self.bytes[kind] += 2 * tensor.nbytes * (ranks - 1) // ranks
            else:
                self.bytes[kind] += abs(args[0].nbytes - args[1].nbytes)
        return func(*args, **(kwargs or {}))


def step(micro_batches: int, fsdp2: dict[str, Any]) -> tuple[Sent, Sent]:
    """One step of a tiny Wan: what it sends, and what the plan says."""
    model = sharded(**fsdp2)
    exchange = GradientExchange([model.predictor], model.device_mesh, micro_batches)
    with Sending() as real:
        for micro in range(micro_batches):
            loss = loss_of(model.predictor, micro)
            exchange.begin(micro)
            loss.backward()
    plan = model.sharding_plans["predictor"]
    made = replace(costs(plan, shards=model.device_mesh.size(-1)), units=(), micro_batches=micro_batches)
    told: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for one in step_collectives(made, ParallelSizes(), dist.get_world_size()):
        told[one.kind] += one.bytes
        number[one.kind] += one.count
    return {k: (n, real.bytes[k]) for k, n in real.count.items()}, {
        k: (n, told[k]) for k, n in number.items()
    }


CASES: list[tuple[int, int, dict[str, Any]]] = [
    (2, 1, {}),
    (2, 2, {"reshard_after_forward": False, "param_dtype": "bf16", "reduce_dtype": "fp32"}),
    (4, 2, {"sharding_size": 2}),
    (4, 1, {"reshard_after_forward": 2, "recompute_modules": ("predictor.blocks.{*}",)}),
]


@pytest.mark.parametrize(("world", "micro_batches", "fsdp2"), CASES)
def test_bytes_and_calls_of_a_step(world: int, micro_batches: int, fsdp2: dict[str, Any]) -> None:
    for real, told in run_ranks(step, world, micro_batches, fsdp2):
        assert {kind: number for kind, (number, _) in real.items()} == {k: n for k, (n, _) in told.items()}
        for kind, (_, size) in told.items():  # dimensions that the ranks do not divide are padded
            assert size == pytest.approx(real[kind][1], rel=0.05), kind
