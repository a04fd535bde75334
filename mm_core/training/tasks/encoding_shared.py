"""Encoding shared among ranks that train on the same micro batches: each encodes some, and hands them to the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mm_core.sharding.mesh import ParallelMesh
from mm_core.weights.agreement import everywhere


class _Spec(NamedTuple):
    """A tensor that is about to be sent: its name, its place in a list (None: no list), shape and dtype."""

    name: str
    place: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype


class EncodingGroup:
    """The ranks that train on the same micro batches. The n-th one is encoded by rank n modulo their number.

    Args:
        ranks: of all ranks of the job, by number.
        group: of them, of its own: encoding may go on beside the training, whose collectives have another order.
    """

    def __init__(self, ranks: list[int], group: dist.ProcessGroup) -> None:
        self.ranks, self.group = ranks, group
        self.size = len(ranks)
        self.rank = ranks.index(dist.get_rank())

    def exchange(
        self, own: Mapping[int, Mapping[str, Any]], count: int, device: torch.device
    ) -> list[dict[str, Any]]:
        """What all have made, on every rank. All ranks of the group call this.

        Args:
            own: number of a micro batch -> name -> tensor, or a list of tensors.
            count: of all micro batches.
        """
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, {n: _specs(tensors) for n, tensors in own.items()}, group=self.group)
        made = []
        for number in range(count):
            owner = number % self.size
            tensors: dict[str, Any] = {}
            for spec in told[owner][number]:
                if owner == self.rank:
                    value = own[number][spec.name]
                    tensor = (value if spec.place is None else value[spec.place]).contiguous()
                else:
                    tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
                dist.broadcast(tensor, src=self.ranks[owner], group=self.group)
                if spec.place is None:
                    tensors[spec.name] = tensor
                else:
                    tensors.setdefault(spec.name, []).append(tensor)
            made.append(tensors)
        return made


def encoding_group(mesh: ParallelMesh) -> EncodingGroup | None:
    """The ranks that train on this rank's micro batches; None if it is alone. Every rank of the job calls this."""
    places = everywhere((mesh.dp_rank, mesh.pp_rank))
    mine = (mesh.dp_rank, mesh.pp_rank)
    found = None
    for place in sorted(set(map(tuple, places))):
        ranks = [rank for rank, other in enumerate(places) if tuple(other) == place]
        if len(ranks) == 1:
            continue
        group = dist.new_group(ranks)  # every rank takes part in making each of them
        if place == mine:
            found = EncodingGroup(ranks, group)
    return found


def _specs(tensors: Mapping[str, Any]) -> list[_Spec]:
    return [
        _Spec(name, place, tuple(tensor.shape), tensor.dtype)
        for name, value in tensors.items()
        for place, tensor in ([(None, value)] if isinstance(value, torch.Tensor) else enumerate(value))
    ]
