"""What the micro batches of one optimizer step add up to, on a rank and then over all ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

_TOKEN_UNIT = (
    4096  # counts are summed in fp32 in two parts, each far below 2^24, where fp32 stops being exact
)


@dataclass(frozen=True)
class StepTotals:
    """Sums over the global batch; `stop` is true when any rank was asked to stop, `save_failed` when any rank knows of a
    checkpoint that could not be written.
    """

    loss: float
    weight: float
    tokens: float
    stop: bool
    metrics: dict[str, float]
    save_failed: bool = False
    parts: tuple[tuple[float, float], ...] = ()  # loss and weight of each expert, where there are several


class StepSums:
    """Adds up losses, weights and metrics, and reduces them in one collective.

    Args:
        device: of the losses; the sums stay there until `reduce`.
        parts: experts, whose losses and weights are added up apart as well.
    """

    def __init__(self, device: torch.device, parts: int = 0) -> None:
        self.parts = torch.zeros(2, parts, device=device)  # losses, weights
        self.loss = torch.zeros((), device=device)
        self.weight = torch.zeros((), device=device)
        self.tokens = 0
        self.metrics: dict[str, torch.Tensor] = {}
        self.samples: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each micro batch, as they were added

    def add(
        self,
        losses: torch.Tensor,
        weights: torch.Tensor,
        metrics: dict[str, torch.Tensor],
        tokens: int,
        part: int = 0,
    ) -> None:
        """Add one micro batch: losses `[B]`, weights `[B]`, metrics 0-d; of this expert."""
        if self.parts.shape[1]:
            self.parts[0, part] += losses.detach().sum(dtype=torch.float32)
            self.parts[1, part] += weights.detach().sum(dtype=torch.float32)
        self.samples.append((losses.detach(), weights.detach()))
        self.loss += losses.detach().sum(dtype=torch.float32)
        self.weight += weights.detach().sum(dtype=torch.float32)
        self.tokens += tokens
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, torch.zeros_like(self.loss)) + value.detach()

    def reduce(
        self,
        stop: bool,
        others: torch.Tensor | None = None,
        *,
        save_failed: bool = False,
        names: Collection[str] | None = None,
    ) -> ReducedSums:
        """Sum over all ranks. Every rank must have the same metric names.

        Args:
            others: more numbers to be summed, `[N]`, fp32, on the same device.
            names: of the metrics; by default those that were added. A stage without losses has none of its own.
        """
        names = sorted(self.metrics if names is None else names)
        unknown = sorted(self.metrics.keys() - set(names))
        assert not unknown, f"metrics that no other rank knows of: {unknown}"
        numbers = torch.stack(
            [
                self.loss,
                self.weight,
                *(self.metrics.get(name, self.loss.new_zeros(())) for name in names),
                # Not new_tensor: a copy from the host waits for the device.
                self.loss.new_full((), float(stop)),
                self.loss.new_full((), float(save_failed)),
                self.loss.new_full((), self.tokens // _TOKEN_UNIT),
                self.loss.new_full((), self.tokens % _TOKEN_UNIT),
            ]
        )
        numbers = torch.cat([numbers, self.parts.flatten()])
        own = len(numbers)
        if others is not None and len(others):
            numbers = torch.cat([numbers, others])
        if dist.get_world_size() > 1:
            dist.all_reduce(numbers)
        return ReducedSums(numbers[:own], numbers[own:], tuple(names), self.parts.shape[1])


@dataclass(frozen=True)
class ReducedSums:
    """Sums over all ranks, still on the device.

    Args:
        numbers: those of `StepSums`; `totals` gives them names.
        others: those that were given beside them.
    """

    numbers: torch.Tensor
    others: torch.Tensor
    metrics: tuple[str, ...]
    parts: int = 0

    @property
    def part_weights(self) -> torch.Tensor:
        """Of each expert, `[parts]`."""
        return self.numbers[len(self.numbers) - self.parts :]

    @property
    def loss(self) -> torch.Tensor:
        """0-d, not yet divided by the weight."""
        return self.numbers[0]

    @property
    def weight(self) -> torch.Tensor:
        """0-d."""
        return self.numbers[1]

    def totals(self, numbers: Sequence[float] | None = None) -> StepTotals:
        """By name.

        Args:
            numbers: a copy on the host; without it this waits for the device.
        """
        values = list(self.numbers.tolist() if numbers is None else numbers)
        end = len(values) - 2 * self.parts
        values, losses, weights = values[:end], values[end : end + self.parts], values[end + self.parts :]
        loss, weight, *metrics, stopped, failed, thousands, rest = values
        tokens = thousands * _TOKEN_UNIT + rest
        named = dict(zip(self.metrics, metrics, strict=True))
        parts = tuple(zip(losses, weights, strict=True))
        return StepTotals(loss, weight, tokens, stopped > 0, named, failed > 0, parts)
