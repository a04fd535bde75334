"""How evenly a router deals tokens to experts: counts of each layer, and what is to be known of them at a glance.

No token is ever dropped and no expert has a capacity, so an uneven load costs time and memory, and nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mm_core.sharding.expert_form import argument_order
from mm_core.sharding.grouped import tokens_of_experts
from mm_core.sharding.plan import ShardingError, bare_name

METRICS = ("expert_load_max", "expert_load_min", "expert_load_entropy", "experts_idle")


def expert_modules(root: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Path of each module of experts -> it and the number of its experts, found by their form: parameters that agree on
    dimension 0, and a forward of tokens, their experts and weights. The module may be sharded.
    """
    found = {}
    for path, module in root.named_modules():
        own = list(module.parameters(recurse=False))
        numbers = {p.shape[0] for p in own if p.ndim > 1}
        if len(numbers) == 1 and any(p.ndim == 3 for p in own) and _place(module) is not None:
            found[bare_name(path)] = (module, numbers.pop())
    return found


class ExpertLoad:
    """Counts the tokens that each expert of a model is given, from one optimizer step to the next.

    Every rank of the job makes one, of whatever part of the model it has. Counting waits for nothing. A layer that is
    recomputed counts twice, and so does each rank that works on the same tokens: shares of a layer are what counts.

    Args:
        root: the model; sharded or not.

    Attributes:
        layers: of all ranks: path -> number of experts, in the order of the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._own = expert_modules(root)
        self._counts: dict[str, torch.Tensor] = {}
        for path, (module, experts) in self._own.items():
            place = _place(module)
            assert place is not None
            module.register_forward_pre_hook(self._counting(path, experts, *place), with_kwargs=True)
        mine = {path: experts for path, (_, experts) in self._own.items()}
        parts: list[Any] = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)  # the stages of a pipeline have other layers
        self.layers: dict[str, int] = dict(
            sorted({k: v for part in parts for k, v in part.items()}.items(), key=_natural)
        )

    def numbers(self, device: torch.device) -> torch.Tensor:
        """What this rank counted since the last call, fp32 `[all layers × their experts]`; to be summed over all ranks."""
        parts = [
            self._counts[path] if path in self._counts else torch.zeros(experts, device=device)
            for path, experts in self.layers.items()
        ]
        self._counts = {}
        return torch.cat([part.to(device) for part in parts]) if parts else torch.zeros(0, device=device)

    def shares(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Layer -> the share of each expert of its tokens `[experts]`, adding up to 1; without layers that did not run.

        Args:
            numbers: sums over all ranks of `numbers()`.
        """
        parts = numbers.split(list(self.layers.values()))
        return {
            path: part / part.sum() for path, part in zip(self.layers, parts, strict=True) if part.sum() > 0
        }

    def metrics(self, numbers: torch.Tensor) -> dict[str, float]:
        """What is said of a step: `expert_load_max` and `_min`, the load of the fullest and the emptiest expert of any layer,
        as a multiple of an even load; `expert_load_entropy`, the mean of the layers' entropies, 1 if each load is even and
        0 if each layer uses one expert; `experts_idle`, how many got no token.

        Args:
            numbers: as in `shares`.
        """
        shares = list(self.shares(numbers.double().cpu()).values())
        if not shares:
            return {}
        return dict(zip(METRICS, _statistics(shares), strict=True))

    def _counting(self, path: str, experts: int, index: int, name: str) -> Any:
        def count(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            chosen = kwargs.get(name, args[index] if index < len(args) else None)
            # A rank that only takes part in the collectives of a layer gives it no tokens (see `participation`).
            if not isinstance(chosen, torch.Tensor) or chosen.is_floating_point() or chosen.is_meta:
                return
            if module.training and torch.is_grad_enabled():
                new = tokens_of_experts(chosen, experts).float()
                self._counts[path] = self._counts[path] + new if path in self._counts else new

        return count


def _statistics(shares: Sequence[torch.Tensor]) -> tuple[float, float, float, float]:
    most = max(float(share.max()) * len(share) for share in shares)
    least = min(float(share.min()) * len(share) for share in shares)
    entropies = [float(torch.special.entr(share).sum()) / math.log(len(share)) for share in shares]
    idle = sum(int((share == 0).sum()) for share in shares)
    return most, least, sum(entropies) / len(entropies), float(idle)


def _place(module: nn.Module) -> tuple[int, str] | None:
    """Where a forward takes the experts of each token, by number and by name; None if it takes none."""
    try:
        index, _ = argument_order(module, "")
    except ShardingError:
        return None
    return index, list(inspect.signature(module.forward).parameters)[index]


def _natural(item: tuple[str, int]) -> list[tuple[int, str]]:
    """`layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in item[0].split(".")]
