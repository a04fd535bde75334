"""What `mm plan` says ranks send, against what FSDP2 sends in a real step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3ForCausalLM

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.planning.collectives import step_collectives
from mm_core.planning.job import filled
from mm_core.planning.trace import trace_micro_batch
from mm_core.sharding.build import build_plans
from mm_core.sharding.mesh import build_parallel_mesh
from mm_core.training.step import GradientExchange
from mm_core.weights import materialize
from tests.distributed.harness import run_ranks
from tests.distributed.models import DENSE
from tests.distributed.test_plan_peak import GROUPED, batch_of, loss
from tests.distributed.tiny import loss_of, sharded
from tests.unit.planning.made import costs

pytestmark = pytest.mark.timeout(120)

_INSIDE = ("all_reduce", "all_to_all_single", "alltoall_base_", "all_gather_into_tensor", "send")
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


class Calling(TorchDispatchMode):
    """Counts calls of collectives that the model makes itself, and the bytes that it hands to them, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # its local tensors come by here
        if func.namespace in ("c10d", "_c10d_functional") and func._opname in _INSIDE:
            source = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            name = func._opname.strip("_")
            self.calls[name] += 1
            self.bytes[name] += source[-1 if func.namespace == "c10d" else 0].nbytes
        return func(*args, **(kwargs or {}))


def untied() -> nn.Module:
    """The dense transformer with a head of its own, as tensor parallelism wants."""
    config = DENSE.make().config
    config.tie_word_embeddings = False
    return Qwen3ForCausalLM(config)


def micro_batch(fsdp2: dict[str, Any], sizes: ParallelSizes) -> tuple[Counter[str], ...]:
    """Calls and bytes of a micro batch: of a real one, and of its trace."""
    model = GROUPED if sizes.ep > 1 else replace(DENSE, make=untied)
    composite, config = model.composite(), Fsdp2Config(**fsdp2)
    root = composite.predictor
    plan = build_plans({"predictor": root}, {"predictor": model.policy}, config, composite)["predictor"]
    mesh = build_parallel_mesh(config, sizes)
    batch = batch_of(model, 1, 0)
    trace = trace_micro_batch(
        root,
        plan,
        mesh.fsdp,
        lambda module, inputs: loss(model, module, inputs),
        prepare=lambda: filled(batch),
        parallel=mesh,
    )
    calls: Counter[str] = Counter()
    told: Counter[str] = Counter()
    for unit in trace.units:
        for key, size in unit.collectives.items():
            name = key.split()[0]
            told[name] += size * unit.count
            calls[name] += unit.calls[key] * unit.count
    composite = model.composite()
    composite.fully_shard(None, config, sizes)
    materialize(composite.predictor, "cpu", 0)
    with Calling() as real:
        loss(model, composite.predictor, batch)[0].backward()
    return real.calls, calls, real.bytes, told


@pytest.mark.parametrize("sizes", [ParallelSizes(ep=2), ParallelSizes(tp=2)], ids=["experts", "tensor"])
def test_calls_and_bytes_inside_units(sizes: ParallelSizes) -> None:
    """Backward passes and recomputation call them too."""
    fsdp2 = {"expert_parallel_size": sizes.ep, "recompute_modules": ("predictor.model.layers.{*}",)}
    real_calls, calls, real, told = run_ranks(micro_batch, 2, fsdp2, sizes)[0]
    assert real_calls
    assert calls == real_calls
    for name, size in told.items():  # experts get unequally many tokens
        assert size == pytest.approx(real[name], rel=0 if sizes.tp > 1 else 0.15), name
