"""The micro batches of a step that trains two experts: first those of the one, then those of the other, on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mm_core.data.dealing import Deal
from mm_core.training.step import GradientExchange, Passes
from mm_core.training.sums import StepSums
from mm_core.training.tasks.base import Task
from mm_core.training.updates import ExpertUpdates

#: An expert's number of micro batches varies from step to step; more than one is what exchanges must be made for.
_SEVERAL = 2


class ExpertPasses(Passes):
    """Forward and backward passes of micro batches that were dealt by expert; see `mm_core.data.dealing`.

    Args:
        model: what the task is given.
        task: its inputs tell their `deal`.
        experts: names of the experts in the model, each a root of its own.
        mesh: of the data-parallel ranks.
        updates: told when an expert's micro batches begin and end.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        experts: Sequence[str],
        mesh: DeviceMesh,
        updates: ExpertUpdates,
    ) -> None:
        self.exchanges = [GradientExchange([model.get_submodule(name)], mesh, _SEVERAL) for name in experts]
        super().__init__(model, task, self.exchanges[0], _SEVERAL)
        self.updates = updates

    def run(self, micro_batches: Iterable[Any], sums: StepSums) -> None:
        """See `Passes.run`; the losses and weights of each expert are also added up apart."""
        at_work, ended = -1, False
        for inputs in micro_batches:
            deal: Deal = inputs.deal
            if deal.expert != at_work:
                at_work = deal.expert
                self.updates.begin(at_work)
            losses, weights, metrics = self.task.loss(self.task.forward(self.model, inputs), inputs)
            self.exchanges[at_work].expect(deal.last_of_expert)
            losses.sum().backward()
            sums.add(losses, weights, metrics, self.task.tokens(inputs), at_work)
            if deal.last_of_expert:
                self.updates.end(at_work, sums.loss.device)
            ended = deal.last_of_step
        assert ended, "the task made fewer micro batches than the step has"
