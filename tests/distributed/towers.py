"""A small model of two towers, of which a micro batch may need only one: what `test_participation` trains.

Vision blocks feed several text layers (deepstack), and each text layer sends its tokens through one of two branches.
One branch of each layer, and one more module, no micro batch ever needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mm_core.sharding import FSDP2Mixin, ShardingPolicy

SIZE = 6


@dataclass(frozen=True)
class Batch:
    """A micro batch: tokens `[B, T]`, pixels `[B, T, SIZE]` or None, and which branch the tokens take."""

    tokens: torch.Tensor
    pixels: torch.Tensor | None
    branch: int


class Block(nn.Module):
    """A layer with a spare parameter that nothing uses."""

    def __init__(self, size: int, branches: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.spare = nn.Parameter(torch.empty(3))
        self.branches = nn.ModuleList(nn.Linear(size, size) for _ in range(branches))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.spare)

    def forward(self, x: torch.Tensor, branch: int | None = None) -> torch.Tensor:
        x = x + self.down(F.silu(self.up(x)))
        return x if branch is None else x + torch.tanh(self.branches[branch](x))


class TwoTowers(nn.Module):
    """Text with pictures in it. The sizes of the units differ, so that a wrong pair of collectives is noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(SIZE, 5)
        self.vision = nn.ModuleList(Block(5) for _ in range(3))
        self.mergers = nn.ModuleList(nn.Linear(5, SIZE) for _ in range(3))
        self.embed = nn.Embedding(11, SIZE)
        self.text = nn.ModuleList(Block(SIZE, branches=3) for _ in range(3))
        self.unused = nn.Linear(SIZE, 4)
        self.head = nn.Linear(SIZE, 11, bias=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        seen = []
        if batch.pixels is not None:
            x = self.patch(batch.pixels)
            for block, merger in zip(self.vision, self.mergers, strict=True):
                x = block(x)
                seen.append(merger(x))
        hidden = self.embed(batch.tokens)
        if seen:
            hidden = hidden + seen[-1]
        for block, deep in zip(self.text, [*seen[:-1], None] if seen else [None] * 3, strict=True):
            hidden = block(hidden, batch.branch)
            hidden = hidden if deep is None else hidden + deep
        logits: torch.Tensor = self.head(hidden)
        return logits


IN_ORDER = (
    "vision.0", "mergers.0", "vision.1", "mergers.1", "vision.2", "mergers.2",
    "text.{*}", "text.{*}.branches.{*}", "unused",
)  # fmt: skip


class Towers(nn.Module, FSDP2Mixin):
    """The model as one FSDP root, whose forward takes a `Batch`."""

    def __init__(self, units: tuple[str, ...] = IN_ORDER, recompute: tuple[str, ...] = ()) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = TwoTowers()
        self.policy = ShardingPolicy(units=units, recompute=recompute)

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        return {"model": self.policy}


def micro_batch(step: int, rank: int, micro: int, images: str) -> Batch:
    """What a rank sees; the same whoever asks.

    Args:
        images: one letter for each rank and micro batch in turn: `i` with an image, `t` without.
    """
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    tokens = torch.randint(11, (2, 4), generator=generator)
    pixels = torch.randn(2, 4, SIZE, generator=generator)
    kind = images[(2 * step + 3 * micro + rank) % len(images)]
    return Batch(tokens, pixels if kind == "i" else None, branch=(step + rank) % 2)


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of the tokens' losses."""
    logits = model(batch)
    return F.cross_entropy(logits.float().flatten(0, 1), batch.tokens.flatten(), reduction="sum")
