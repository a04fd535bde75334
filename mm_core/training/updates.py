"""From the gradients of a step to new weights: of one network, or of two experts, each of which learns its own samples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from mm_core.models.sora import EXPERT_NAMES
from mm_core.training.ema import ExponentialAverage
from mm_core.training.gradients import scale_and_clip, scale_by, total_norm
from mm_core.training.host_storage import HostStorage
from mm_core.training.sums import ReducedSums
from mm_core.weights.tensors import local_part


class Updates:
    """Scales and clips the gradients of all that is trained, and takes the optimizer's step.

    Args:
        trained: name of component -> module.
        optimizer: of all parameters.
        ranks: that gradients are a mean over. FSDP takes the mean of gradients over its ranks; what is wanted is their sum
            divided by the weight of the whole global batch. Ranks that share tensors compute one loss together, and each
            of them counts its weight.
        max_norm: see `scale_and_clip`.
        stages: ranks that hold the other stages of the same model.
        ema: the averages of the weights, if there are some.
    """

    parts = 0
    """Experts whose sums are kept apart."""
    offloads = False
    """Whether an expert that is not at work waits in host memory."""

    def __init__(
        self,
        trained: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        ranks: int,
        max_norm: float,
        stages: dist.ProcessGroup | None = None,
        ema: ExponentialAverage | None = None,
    ) -> None:
        self.parameters = {
            name: [p for p in module.parameters() if p.requires_grad] for name, module in trained.items()
        }
        self.optimizer, self.ema = optimizer, ema
        self.ranks, self.max_norm, self.stages = ranks, max_norm, stages

    def norms(self, sums: ReducedSums) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Make the gradients those of the mean loss, clipped.

        Args:
            sums: of the step, over all ranks.

        Returns:
            The norm of all of them before clipping, 0-d, and that of each expert, by its name in metrics.
        """
        everything = (p for parameters in self.parameters.values() for p in parameters)
        return scale_and_clip(everything, self.ranks / sums.weight, self.max_norm, self.stages), {}

    def step(self) -> None:
        """Change the weights, and forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()

    def all_here(self) -> None:
        """Bring everything to the device that waits in host memory."""


class ExpertUpdates(Updates):
    """The same for two experts: each averages over its own samples, is clipped by its own norm, and takes a step only if it
    had samples in the global batch; its momenta and averages, too, stay as they are without.

    Args:
        offload: keep the parameters, gradients, momenta and averages of the expert that is not at work in host memory.
        others: those of `Updates`.
    """

    parts = len(EXPERT_NAMES)

    def __init__(
        self,
        trained: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        ranks: int,
        max_norm: float,
        stages: dist.ProcessGroup | None = None,
        ema: ExponentialAverage | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(trained, optimizer, ranks=ranks, max_norm=max_norm, stages=stages, ema=ema)
        self.names = tuple(self.parameters)
        self.offloads = offload
        self._waiting = {name: HostStorage() for name in self.names} if offload else {}
        self._norms: dict[str, torch.Tensor] = {}  # of the experts that ran in this step, not yet scaled
        self._scales: dict[str, torch.Tensor] = {}

    def begin(self, expert: int) -> None:
        """An expert's micro batches come next."""
        self._bring(self.names[expert])

    def end(self, expert: int, device: torch.device) -> None:
        """An expert's micro batches are done. Its gradients may go, and what is needed of them is their norm."""
        name = self.names[expert]
        self._norms[name] = total_norm(self.parameters[name], device, self.stages)

    def norms(self, sums: ReducedSums) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Updates.norms`; the gradients are scaled and clipped in `step`."""
        weights = sums.part_weights
        self._scales, told = {}, {}
        for number, (name, short) in enumerate(zip(self.names, EXPERT_NAMES, strict=True)):
            told[short] = torch.zeros_like(sums.weight)
            if name in self._norms:
                self._scales[name] = self.ranks / weights[number]
                told[short] = self._norms[name] * self._scales[name]
        return torch.stack([*told.values()]).square().sum().sqrt(), told

    def step(self) -> None:
        """See `Updates.step`."""
        # The expert that is on the device first: each is moved once a step.
        for name in sorted(self._norms, key=lambda one: one in self._waiting and self._waiting[one].away):
            self._bring(name)
            parameters = self.parameters[name]
            scale_by(parameters, self._norms[name], self._scales[name], self.max_norm)
            with _only(self.optimizer, parameters):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update(name)
        self._norms.clear()

    def all_here(self) -> None:
        for storage in self._waiting.values():
            storage.back()

    def _bring(self, name: str) -> None:
        """Let one expert be on the device, and the other not."""
        if not self._waiting:
            return
        for other, storage in self._waiting.items():
            if other != name and not storage.away:
                storage.send(self._tensors(other))
        self._waiting[name].back()

    def _tensors(self, name: str) -> Iterator[torch.Tensor]:
        """All that an expert keeps between its micro batches, on this rank."""
        averages: Collection[torch.Tensor] = () if self.ema is None else self.ema.tensors(name).values()
        for parameter in self.parameters[name]:
            yield local_part(parameter.detach())[0]
            if parameter.grad is not None:
                yield local_part(parameter.grad)[0]
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.ndim:
                    yield local_part(value)[0]
        yield from (local_part(average)[0] for average in averages)


def build_updates(
    trained: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    *,
    experts: Sequence[str],
    offload: bool,
    ranks: int,
    max_norm: float,
    stages: dist.ProcessGroup | None,
    ema: ExponentialAverage | None,
) -> Updates:
    """Return what turns gradients into weights.

    Args:
        experts: names of the components that learn their own samples; empty if all that is trained is one.
        others: see `Updates` and `ExpertUpdates`.
    """
    if experts:
        return ExpertUpdates(
            trained, optimizer, ranks=ranks, max_norm=max_norm, stages=stages, ema=ema, offload=offload
        )
    return Updates(trained, optimizer, ranks=ranks, max_norm=max_norm, stages=stages, ema=ema)


@contextmanager
def _only(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let an optimizer know only of some of its parameters."""
    chosen = set(parameters)
    whole = [group["params"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p in chosen]
        yield
    finally:
        for group, params in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = params
