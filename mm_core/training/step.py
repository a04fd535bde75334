"""What an optimizer step needs beside its loss: when gradients are exchanged, whose are dropped, how it is reported."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from mm_core.accelerator import Accelerator
from mm_core.sharding.mesh import ParallelMesh
from mm_core.sharding.participation import participation_of
from mm_core.sharding.plan import ShardingError, bare_name
from mm_core.training.sums import ReducedSums, StepSums, StepTotals
from mm_core.training.tasks.base import Task
from mm_core.weights.agreement import everywhere


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm is NaN or infinite; that step changed no weight. All ranks raise it.

    Attributes:
        report: of the step.
    """

    def __init__(self, message: str, report: StepReport | None = None) -> None:
        super().__init__(message)
        self.report = report


class GradientExchange:
    """When the gradients of several micro batches are exchanged.

    Each micro batch reduces over the ranks that share the parameters, so that a rank keeps its shard of the
    gradients only; without that it would hold whole ones until the last micro batch. Where parameters are also
    replicated (`sharding_size` below the number of ranks), shards are summed over the replicas once, after the last
    micro batch: that costs no memory, and the replicas are where the network is slowest.

    Args:
        roots: sharded or not; the latter have nothing to exchange.
        mesh: of the data-parallel ranks, replicas first if there are any.
        accumulation: micro batches of an optimizer step.
    """

    def __init__(self, roots: Iterable[nn.Module], mesh: DeviceMesh, accumulation: int) -> None:
        self.roots = [root for root in roots if isinstance(root, FSDPModule)]
        self.accumulation = accumulation
        # Of several roots one may not run in the last micro batch, and what it has summed would stay where it is.
        self.defers = accumulation > 1 and mesh.ndim > 1 and len(self.roots) == 1
        self.ranks = mesh.size()

    def begin(self, micro: int) -> None:
        """Before the backward pass of a micro batch, counted from 0."""
        self.expect(micro == self.accumulation - 1)

    def expect(self, last: bool) -> None:
        """The same, if it is known whether the micro batch is the last one."""
        if not self.defers:
            return
        for root in self.roots:
            root.set_requires_all_reduce(last)
            root.set_is_last_backward(last)

    def __str__(self) -> str:
        if self.ranks == 1 or not self.roots:
            return "gradients stay on this rank"
        if self.defers:
            return "gradients are reduced over shards in each micro batch, over replicas in the last one"
        return (
            "gradients are reduced in each micro batch"
            if self.accumulation > 1
            else "gradients are reduced once"
        )


class Passes:
    """Forward and backward passes of the micro batches of one optimizer step, one after the other.

    Args:
        model: what the task is given.
        task: see `mm_core.training.tasks.base.Task`.
        exchange: of the gradients.
        accumulation: micro batches of a step.
    """

    def __init__(self, model: nn.Module, task: Task, exchange: GradientExchange, accumulation: int) -> None:
        self.model, self.task, self.exchange, self.accumulation = model, task, exchange, accumulation

    def run(self, micro_batches: Iterable[Any], sums: StepSums) -> None:
        """Leave the gradients of the sum of all losses, a mean over FSDP's ranks, and add to the step's sums.

        Args:
            micro_batches: as `Task.prepare` yields them.
        """
        count = 0
        for count, inputs in enumerate(micro_batches, start=1):
            # The outputs have no name here: all logits of a large vocabulary would be kept through the backward pass.
            losses, weights, metrics = self.task.loss(self.task.forward(self.model, inputs), inputs)
            self.exchange.begin(count - 1)
            losses.sum().backward()
            sums.add(losses, weights, metrics, self.task.tokens(inputs))
        assert count == self.accumulation, f"the task made {count} of {self.accumulation} micro batches"


class UnusedParameters:
    """Parameters that no micro batch of the global batch needed have no gradient, as in one process.

    Those that only some ranks need have zeros on the others (see `mm_core.sharding.participation`), and so have
    those that nobody needs: an optimizer would let them decay.

    Args:
        roots: FSDP roots that hold the parameters.
        device: of the step's sums.
        stages: pipeline stages. Each has parameters of its own, which its own ranks settle among themselves.
    """

    def __init__(self, roots: Iterable[nn.Module], device: torch.device, stages: int = 1) -> None:
        self._ranks = dist.get_world_size() // stages
        self.shares = [(root, share) for root in roots if (share := participation_of(root)) is not None]
        self.parameters = [
            {bare_name(name): p for name, p in root.named_parameters() if p.requires_grad}
            for root, _ in self.shares
        ]
        count = sum(map(len, self.parameters))
        # In most steps every rank needs every parameter.
        self._all = torch.ones(count + 2, device=device) if self.shares else torch.zeros(0, device=device)
        self._all[count:] = 0
        self._unused: list[tuple[int, nn.Parameter]] = []

    def numbers(self) -> torch.Tensor:
        """What this rank adds to the step's sums: one for each parameter it needed; then the forward pass, if any, in
        which units ran in another order than the plan's, and its square.
        """
        self._unused, first, disorder = [], 0, 0
        for (_, share), parameters in zip(self.shares, self.parameters, strict=True):
            disorder = disorder or share.disorder_pass
            unused = share.take_unused()
            if unused:
                self._unused += [(first + i, p) for i, (n, p) in enumerate(parameters.items()) if n in unused]
            first += len(parameters)
        if not (self._unused or disorder):
            return self._all
        own = self._all.tolist()
        for i, _ in self._unused:
            own[i] = 0.0
        own[-2:] = [float(disorder), float(disorder**2)]
        return torch.tensor(own, device=self._all.device)

    def settle(self, groups: Iterable[dist.ProcessGroup]) -> torch.Tensor:
        """Sum `numbers()` over the ranks of this stage, and drop what none of them needed.

        Args:
            groups: over which, one after the other, a sum becomes that of the stage.

        Returns:
            1 where `mismatch` is true, else 0, `[1]` fp32.
        """
        own = self.numbers().clone()
        if len(own):
            for group in groups:
                dist.all_reduce(own, group=group)
            self.drop(own)
        return self.mismatch(own, self._ranks).float().view(1)

    def drop(self, reduced: torch.Tensor) -> None:
        """Forget the zeros of parameters that no rank needed.

        Args:
            reduced: sums of `numbers()` over all ranks. Only a rank that did not need something waits for them.
        """
        if not self._unused:
            return
        users = reduced.tolist()
        for i, parameter in self._unused:
            if users[i] == 0:
                parameter.grad = None

    @staticmethod
    def mismatch(reduced: torch.Tensor, ranks: int | None = None) -> torch.Tensor:
        """Whether some ranks found units in another order than the plan's and others did not, in the same pass; 0-d.

        Those others skipped the units, in the plan's order.

        Args:
            reduced: sums of `numbers()`.
            ranks: over so many of them; all by default.
        """
        if not len(reduced):
            return torch.zeros((), device=reduced.device, dtype=torch.bool)
        numbers, squares = reduced[-2], reduced[-1]
        same: torch.Tensor = (
            ranks or dist.get_world_size()
        ) * squares == numbers**2  # numbers that differ vary
        return ~same


class SumsExchange:
    """Makes the sums of a step those of all ranks, and settles whose gradients nobody needs.

    Args:
        unused: the parameters of this rank.
        mesh: of the model. Pipeline stages have parameters of their own, and only the last one has losses.
    """

    def __init__(self, unused: UnusedParameters, mesh: ParallelMesh) -> None:
        self.unused, self.mesh = unused, mesh
        self._names: list[str] | None = None  # of the metrics, which the stages agree on in the first step

    def reduce(
        self, sums: StepSums, stop: bool, *, save_failed: bool = False
    ) -> tuple[ReducedSums, torch.Tensor]:
        """The sums, and whether units ran in orders that do not go together (0-d); all ranks call this."""
        if self.mesh.pp is None:
            reduced = sums.reduce(stop, self.unused.numbers(), save_failed=save_failed)
            self.unused.drop(reduced.others)
            return reduced, self.unused.mismatch(reduced.others)
        if self._names is None:
            self._names = sorted({name for names in everywhere(list(sums.metrics)) for name in names})
        settled = self.unused.settle(self.mesh.stage_groups)
        reduced = sums.reduce(stop, settled, save_failed=save_failed, names=self._names)
        return reduced, reduced.others[0] > 0


@dataclass
class StepReport:
    """The numbers of a step on their way from the device.

    Args:
        step: counted from 1.
        sums: of all ranks.
        norm: of the gradients, 0-d.
        mismatch: from `UnusedParameters.mismatch`.
        samples: of this rank.
        losses: of this rank, a pair of sums `[B]` and weights `[B]` for each micro batch; a stage without losses has none.
        validation: numbers of the validation after this step, if there was one.
    """

    step: int
    sums: ReducedSums
    norm: torch.Tensor
    mismatch: torch.Tensor
    rank: int
    samples: Sequence[int]
    losses: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    rate: float = 0.0
    seconds: float = 0.0
    consumed_samples: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    part_norms: Mapping[str, torch.Tensor] = field(
        default_factory=dict
    )  # of each expert, 0-d; none: one network
    _host: torch.Tensor = field(init=False)

    @property
    def bad(self) -> torch.Tensor:
        """1 where the step must change no weight, else 0; 0-d fp32 on the device."""
        good = self.sums.loss.isfinite() & self.norm.isfinite() & (self.sums.weight > 0) & ~self.mismatch
        return (~good).float()

    def send(self, accelerator: Accelerator) -> None:
        """Start the copy to the host; `read` waits for it."""
        device = self.sums.numbers.device
        norms = [norm.to(device) for norm in self.part_norms.values()]
        extra = torch.stack([*norms, self.norm.to(device), self.mismatch.float()])
        numbers = torch.cat([self.sums.numbers, extra])
        self._host = accelerator.pinned_like(numbers)
        self._host.copy_(numbers, non_blocking=True)
        self._event = accelerator.new_event()
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[StepTotals, float, float]:
        """The sums, the loss and the gradient norm.

        Raises:
            NonFiniteLossError: the step had nothing to learn from, or nothing finite.
            ShardingError: ranks may have exchanged the wrong tensors.
        """
        if self._event is not None:
            self._event.synchronize()
        numbers, (norm, mismatch) = self._numbers()[: len(self.sums.numbers)], self._numbers()[-2:]
        total = self.sums.totals(numbers)
        kept = f"the weights are those of step {self.step - 1}"
        if mismatch:
            raise ShardingError(
                f"step {self.step}: some ranks skipped units that others ran in another order than the sharding plan's, "
                f"so that they may have exchanged the wrong gradients; {kept}. The logs name the units; list them in "
                "the order of the forward pass."
            )
        if not total.weight > 0:
            raise NonFiniteLossError(
                f"step {self.step}: the weights of the global batch add up to {total.weight}, so nothing can be learnt; "
                f"samples of rank {self.rank}: {list(self.samples)}.",
                self,
            )
        loss = total.loss / total.weight
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLossError(
                f"step {self.step}: loss {loss}, gradient norm {norm}; {kept}. "
                f"Samples of rank {self.rank}: {list(self.samples)}. Lower --lr, or set --clip-grad.",
                self,
            )
        return total, loss, norm

    def parts(self) -> dict[str, float]:
        """After `read`: `loss/<expert>`, the mean over its own samples, and `grad_norm/<expert>`, of each that had some."""
        told: dict[str, float] = {}
        numbers = self._numbers()
        parts = self.sums.totals(numbers[: len(self.sums.numbers)]).parts
        norms = numbers[len(self.sums.numbers) : -2]
        for name, (loss, weight), norm in zip(self.part_norms, parts, norms, strict=True):
            if weight > 0:
                told |= {f"loss/{name}": loss / weight, f"grad_norm/{name}": norm}
        return told

    def _numbers(self) -> list[float]:
        numbers: list[float] = self._host.tolist()
        return numbers


def sharded_roots(model: nn.Module, plans: Mapping[str, object]) -> list[nn.Module]:
    """The roots of a model's sharding plans."""
    return [model.get_submodule(path) for path in plans]
