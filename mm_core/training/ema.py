"""The exponential moving average of the trained weights (`--ema-decay`): sharded like them, in fp32, part of each
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mm_core.weights.state_file import EMA
from mm_core.weights.tensors import local_part, state_tensors


class _Averages(nn.Module):
    """Tensors under a module's names, so that a checkpoint stores and reads them as it does a module's."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._averages = dict(tensors)  # no parameters: nothing trains, moves or casts them

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return dict(self._averages)


class ExponentialAverage:
    """`average = decay · average + (1 - decay) · weight` after each optimizer step, of every parameter that is trained.

    It starts as the weights are when it is made. Each rank averages its own shards; nothing is exchanged.

    Args:
        modules: name of component -> its module; sharded and filled, parameters fp32 or not.
        decay: in [0, 1).
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self._averages: dict[str, dict[str, torch.Tensor]] = {}
        self._parameters: dict[str, dict[str, torch.Tensor]] = {}
        for name, module in modules.items():
            # state_tensors brings FSDP modules into their sharded form, whose parameters the optimizer holds too.
            trained: dict[str, torch.Tensor] = {}
            seen: set[int] = set()
            for key, tensor in state_tensors(module).items():
                if (
                    tensor.requires_grad and id(tensor) not in seen
                ):  # a tied one under its first name, as when saved
                    seen.add(id(tensor))
                    trained[key] = tensor
            self._parameters[name] = trained
            self._averages[name] = {k: t.detach().clone().to(torch.float32) for k, t in trained.items()}

    @torch.no_grad()
    def update(self, *components: str) -> None:
        """Take in the weights of the step that was just made, of these components; of all if none is named."""
        chosen = components or tuple(self._averages)
        averages, weights = (
            self._local({name: kind[name] for name in chosen}) for kind in (self._averages, self._parameters)
        )
        if averages:
            weights = [w.to(torch.float32) for w in weights]
            # In one call for all of them; on the parts of this rank, since each is a number for itself.
            torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the weights as they are."""
        for average, weight in zip(self._local(self._averages), self._local(self._parameters), strict=True):
            average.copy_(weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the modules have the averages; afterwards both are bit by bit as before. All units must be sharded, as they are
        between two steps.
        """
        pairs = list(zip(self._local(self._averages), self._local(self._parameters), strict=True))
        # In fp32 the weights wait where the averages are otherwise, which takes no memory.
        alike = [pair for pair in pairs if pair[0].dtype == pair[1].dtype]
        others = [(*pair, pair[1].clone()) for pair in pairs if pair[0].dtype != pair[1].dtype]
        _swap(alike)
        for average, weight, _ in others:
            weight.copy_(average)
        try:
            yield
        finally:
            _swap(alike)
            for _, weight, before in others:
                weight.copy_(before)

    def modules(self) -> dict[str, nn.Module]:
        """`ema.<component>` -> what `save_checkpoint` and `load_checkpoint` take for a module with those tensors."""
        return {f"{EMA}{name}": _Averages(tensors) for name, tensors in self._averages.items()}

    def tensors(self, component: str) -> Mapping[str, torch.Tensor]:
        """The averages of one component by its module's names, fp32, sharded like the parameters."""
        return self._averages[component]

    @staticmethod
    def _local(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [local_part(t)[0] for named in tensors.values() for t in named.values()]


def _swap(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for one, other in pairs:
        waiting = one.clone()
        one.copy_(other)
        other.copy_(waiting)
