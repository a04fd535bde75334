"""A predictor inside a composite on several ranks, as `mm train` has it; for the checks on ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mm_core.config.fsdp2 import Fsdp2Config
from mm_core.config.parallel import ParallelSizes
from mm_core.sharding import FSDP2Mixin, ShardingPolicy
from mm_core.testing import builds
from mm_core.testing.check import CheckFailed, CheckSkipped
from mm_core.testing.forked import RankError, run_ranks
from mm_core.weights import materialize
from mm_core.weights.tensors import named_parameters

if TYPE_CHECKING:
    from mm_core.testing.case import Case

BATCH = 4
LossAndGradients = tuple[float, dict[str, Any]]


class Composite(nn.Module, FSDP2Mixin):
    """A predictor under its name, on the meta device."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.predictor: Any = builds.as_module(builds.build(case, "meta"))
        self._policy = builds.sharding_policy(case) or ShardingPolicy()

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"predictor": self._policy}


def build(
    case: Case,
    seed: int = 0,
    *,
    recompute: Sequence[str] | None = None,
    parallel: ParallelSizes | None = None,
    **fsdp2: Any,
) -> Composite:
    """A composite that was sharded over all ranks and filled.

    Args:
        recompute: paths of modules to recompute; None leaves it to the policy.
        parallel: how ranks share the model beside FSDP2's way.
        fsdp2: fields of fsdp2.yaml.
    """
    model = Composite(case)
    if recompute is not None:
        fsdp2["recompute_modules"] = tuple(f"predictor.{path}" for path in recompute)
    model.fully_shard(None, Fsdp2Config(**fsdp2), parallel)
    materialize(model.predictor, "cpu", seed)
    return model


def recomputed_modules(case: Case) -> list[str]:
    """What the policy would recompute if it is asked to: its own list, or its units."""
    from mm_core.sharding import build_plan

    bare = builds.as_module(builds.build(case, "meta"))
    policy = builds.sharding_policy(case) or ShardingPolicy()
    return list(build_plan(bare, policy, Fsdp2Config(recompute_granularity="full"), "predictor").recompute)


def loss_and_gradients(case: Case, **fsdp2: Any) -> LossAndGradients:
    """Loss and whole gradients of one global batch, which the ranks share, in eval mode (no dropout)."""
    model = build(case, **fsdp2)
    excite(model.predictor)
    model.predictor.eval()
    loss = shared_loss(case, model, 0)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size(), whole_gradients(model)


def shared_loss(case: Case, model: Composite, step: int) -> torch.Tensor:
    """The mean loss over this rank's part of step `step`'s batch."""
    rank, parts = model.parallel_mesh.dp_rank, model.parallel_mesh.dp_size
    mine = slice(rank * BATCH // parts, (rank + 1) * BATCH // parts)
    given = builds.part(builds.inputs(case, BATCH, seed=step), mine)
    output = builds.run(case, model.predictor, given)
    target = builds.samples(BATCH, output.shape[1:], step, "target")[mine]
    return (output.float() - target).square().mean()


def optimizer_of(model: Composite) -> torch.optim.Optimizer:
    """AdamW over the trained parameters."""
    trained = [p for p in model.predictor.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01, fused=True)


def train(
    case: Case, model: Composite, optimizer: torch.optim.Optimizer, first: int, last: int
) -> list[float]:
    """Steps `first` to `last` (exclusive); this rank's losses."""
    losses = []
    model.predictor.train()
    for step in range(first, last):
        loss = shared_loss(case, model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole_gradients(model: Composite) -> dict[str, Any]:
    """Gradients by name as NumPy arrays, on every rank (a collective)."""
    return {
        name: _whole(parameter.grad)
        for name, parameter in named_parameters(model.predictor)
        if parameter.grad is not None
    }


def whole_parameters(model: Composite) -> dict[str, Any]:
    """Parameters by name as NumPy arrays, on every rank (a collective)."""
    return {name: _whole(parameter) for name, parameter in named_parameters(model.predictor)}


def gradient_distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Norm of the difference of all gradients, relative to that of `b`; infinite if names differ."""
    if a.keys() != b.keys():
        return float("inf")
    difference = sum(float(np.square(a[name] - b[name], dtype=np.float64).sum()) for name in b)
    norm = sum(float(np.square(b[name], dtype=np.float64).sum()) for name in b)
    return float((difference / max(norm, 1e-24)) ** 0.5)


def must_agree(found: LossAndGradients, expected: LossAndGradients, tolerance: float, what: str) -> None:
    """Raise CheckFailed unless losses and gradients are the same within a relative tolerance."""
    if unequal := sorted(found[1].keys() ^ expected[1].keys()):
        raise CheckFailed(f"{what}: only one of the two has gradients of {', '.join(unequal[:3])}")
    wrong = sorted({str(value.dtype) for value in found[1].values()} - {"float32"})
    if wrong:
        raise CheckFailed(f"{what}: gradients are {', '.join(wrong)}, not float32")
    if not abs(found[0] - expected[0]) <= tolerance * abs(expected[0]):
        raise CheckFailed(f"{what}: the loss is {found[0]:.6g} instead of {expected[0]:.6g}")
    distance = gradient_distance(found[1], expected[1])
    if not distance <= tolerance:
        raise CheckFailed(
            f"{what}: gradients are {distance:.2g} of their norm away from those of one process in fp32"
        )


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run a function on forked ranks, and return what each returned.

    Raises:
        CheckFailed: a rank raised; the last line of its traceback is the message, and the note of `builds.run`.
        CheckSkipped: a rank raised that.
    """
    try:
        return run_ranks(function, world, *args, timeout=60)
    except RankError as error:
        text = str(error).strip()
        lines = text.splitlines()
        note = f"; {lines.pop()}" if lines[-1].startswith(builds.CALLED) else ""
        name, _, why = lines[-1].partition(": ")
        if name.endswith(CheckSkipped.__name__):
            raise CheckSkipped(why) from None
        raise CheckFailed(f"on {world} rank{'s' * (world > 1)}: {lines[-1]}{note}", text) from None


def excite(module: nn.Module) -> None:
    """As `builds.lively` does: layers that start at zero would leave gradients at zero behind them."""
    from mm_core.random import keyed_generator
    from mm_core.weights.tensors import local_part

    with torch.no_grad():
        for name, parameter in named_parameters(module):
            generator = keyed_generator(0, f"excite {name}")
            noise = torch.randn(tuple(parameter.shape), generator=generator)
            storage, slices = local_part(parameter)
            storage.add_(noise[slices].to(storage.dtype), alpha=0.05)


def _whole(tensor: torch.Tensor) -> Any:
    whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return whole.clone().numpy()
