"""Ranks that share sequences deal out the images that become tokens of these: each looks at some, and all get the features.

The features are gathered as they are, and the backward pass brings each rank the sum of all ranks' gradients of the items
that it looked at. So the tower's own gradients are those of its items, and their sum over the ranks is that of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.utils._pytree import tree_map_only

from mm_core.sharding.context_policy import DealtItems
from mm_core.sharding.plan import ShardingError


def gathered(own: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all ranks, one rank's after another's. Every rank of the group calls this.

    The backward pass gives each rank the sum of all ranks' gradients of its rows.

    Args:
        own: this rank's, `[sizes[rank], …]`.
        sizes: number of rows of each rank.

    Returns:
        `[sum(sizes), …]`.
    """
    ranks = dist.get_world_size(group)
    # To each rank the same. As an all-gather it would need equal lengths, and a way to differentiate it.
    rows = own.unsqueeze(0).expand(ranks, *own.shape).flatten(0, 1)
    return all_to_all_single_autograd(rows.contiguous(), list(sizes), [len(own)] * ranks, group)


@dataclass(frozen=True)
class Deal:
    """Which frames each rank looks at.

    Args:
        frames: number of rows of each frame.
        bounds: of the frames of each rank: those of rank r are `bounds[r]` to `bounds[r + 1]`.
    """

    frames: tuple[int, ...]
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, frames: Sequence[int], ranks: int) -> Deal:
        """Frames in their order, so that the ranks' numbers of rows are nearly the same."""
        ends = [0, *accumulate(frames)]
        bounds = [0]
        for rank in range(1, ranks):
            wanted = ends[-1] * rank / ranks
            nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - wanted))
            bounds.append(max(nearest, bounds[-1]))
        return cls(tuple(frames), (*bounds, len(frames)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of rows of each rank."""
        return tuple(sum(self.frames[a:b]) for a, b in zip(self.bounds[:-1], self.bounds[1:], strict=True))

    def span(self, rank: int) -> tuple[int, int]:
        """The frames that a rank runs: its own, or the smallest one if it has none, whose result it drops: a module that
        some ranks run, all of them run.
        """
        first, last = self.bounds[rank], self.bounds[rank + 1]
        if first < last:
            return first, last
        smallest = min(range(len(self.frames)), key=self.frames.__getitem__)
        return smallest, smallest + 1


def deal_items(
    module: nn.Module, items: DealtItems, names: Sequence[str], group: dist.ProcessGroup, name: str
) -> None:
    """Let a module look at this rank's items only, and return the features of all, by hooks.

    Args:
        names: of the positional arguments of its forward.
        group: the ranks that are given the same items.
        name: of the module, for messages.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    present: list[Deal] = []

    def deal(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        present.clear()
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        rows, grids = given[items.rows], given[items.grids]
        single = torch.repeat_interleave(grids, grids[:, 0], dim=0)
        single[:, 0] = 1
        frames = single.prod(-1).tolist()
        if sum(frames) != len(rows):
            raise ShardingError(
                f"{name}: {items.grids} describes {sum(frames)} rows, but {items.rows} has {len(rows)}; ranks that share "
                "sequences cannot deal them out."
            )
        deal = Deal.of(frames, ranks)
        first, last = deal.span(rank)
        start = sum(frames[:first])
        own = {
            items.rows: rows[start : start + sum(frames[first:last])],
            items.grids: single[first:last],
        }
        present.append(deal)
        positional = tuple(
            own.get(names[i], value) if i < len(names) else value for i, value in enumerate(args)
        )
        return positional, {key: own.get(key, value) for key, value in kwargs.items()}

    def gather(_module: nn.Module, _args: Any, output: Any) -> Any:
        deal = present.pop()
        for field in items.outputs:
            setattr(
                output,
                field,
                tree_map_only(torch.Tensor, _put_together(deal, rank, group), getattr(output, field)),
            )
        return output

    module.register_forward_pre_hook(deal, with_kwargs=True)
    module.register_forward_hook(gather)


def _put_together(deal: Deal, rank: int, group: dist.ProcessGroup) -> Callable[[torch.Tensor], torch.Tensor]:
    first, last = deal.span(rank)
    ran = sum(deal.frames[first:last])

    def put(tensor: torch.Tensor) -> torch.Tensor:
        fewer = ran // len(tensor)  # patches that became one row
        sizes = [size // fewer for size in deal.sizes]
        return gathered(tensor[: sizes[rank]], sizes, group)

    return put
