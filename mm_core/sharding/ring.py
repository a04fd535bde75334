"""Ring attention: queries stay, keys and values go round the ranks that share a sequence.

After Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context"
(arXiv:2310.01889). It needs no number of heads that the ranks divide, and a rank never holds the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from mm_core.sharding.block_attention import (
    Kernel,
    block_backward,
    block_forward,
    kernel_for,
    sum_dtype,
)
from mm_core.sharding.sequence import Documents, SequenceLayout, Span, rectangles

_KEYS, _GRADIENTS = 0, 1
"""Tags of what goes round; both are on their way at the same time."""


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SequenceLayout,
    group: dist.ProcessGroup,
    *,
    causal: bool = False,
    scale: float | None = None,
    documents: Documents | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """`softmax(query key^T · scale) value` over a sequence that the ranks of a group share.

    Every rank of the group calls this. Results of blocks, gradients of queries, and the gradients that go round are
    added up in fp32 (fp64 for fp64).

    Args:
        query: of this rank's tokens, `[B, H, S_rank, D]`.
        key, value: `[B, G, S_rank, D]`, where G divides H.
        layout: which tokens each rank of the group holds.
        causal: tokens see themselves and those before them only.
        scale: of the scores; `1 / sqrt(D)` by default.
        documents: packed ones, which do not see each other.
        kernel: by default what the device has.

    Returns:
        `[B, H, S_rank, D]` in the dtype of `query`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    kernel = kernel_for(query, value) if kernel is None else kernel
    out: torch.Tensor = _RingAttention.apply(
        query, key, value, layout, group, causal, scale, documents, kernel
    )
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: SequenceLayout,
        group: dist.ProcessGroup,
        causal: bool,
        scale: float,
        documents: Documents | None,
        kernel: Kernel,
    ) -> torch.Tensor:
        dtype = sum_dtype(query.dtype)
        out = query.new_zeros(*query.shape[:-1], value.shape[-1], dtype=dtype)
        lse = query.new_full(query.shape[:-1], float("-inf"), dtype=dtype)
        ring = _Ring(layout, group)
        held = [key.contiguous(), value.contiguous()]
        for step in range(ring.size):
            coming = ring.start(held, step, _KEYS) if step < ring.size - 1 else None
            for block in rectangles(layout, ring.rank, ring.origin(step), causal=causal, documents=documents):
                part, part_lse = block_forward(
                    _at(query, block.rows, block.queries),
                    *(_at(tensor, block.rows, block.keys) for tensor in held),
                    causal=block.causal,
                    scale=scale,
                    kernel=kernel,
                )
                _join(
                    _at(out, block.rows, block.queries), _at(lse, block.rows, block.queries), part, part_lse
                )
            if coming is not None:
                held = coming.wait()
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, lse)
        ctx.how = layout, group, causal, scale, documents, kernel
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        layout, group, causal, scale, documents, kernel = ctx.how
        dtype = sum_dtype(query.dtype)
        gradient = gradient.contiguous()
        of_query = torch.zeros_like(query, dtype=dtype)
        ring = _Ring(layout, group)
        held = [key.contiguous(), value.contiguous()]
        sums: _Transfer | None = None  # what the ranks before this one found for the keys that are now here
        for step in range(ring.size):
            coming = ring.start(held, step, _KEYS) if step < ring.size - 1 else None
            own = [torch.zeros_like(tensor, dtype=dtype) for tensor in held]
            for block in rectangles(layout, ring.rank, ring.origin(step), causal=causal, documents=documents):
                seen = block.rows, block.queries
                keys, values = (_at(tensor, block.rows, block.keys) for tensor in held)
                parts = block_backward(
                    _at(gradient, *seen),
                    _at(query, *seen),
                    keys,
                    values,
                    _at(out, *seen),
                    _at(lse, *seen),
                    causal=block.causal,
                    scale=scale,
                    kernel=kernel,
                )
                _at(of_query, *seen).add_(parts[0])
                for tensor, part in zip(own, parts[1:], strict=True):
                    _at(tensor, block.rows, block.keys).add_(part)
            if sums is not None:
                for tensor, before in zip(own, sums.wait(), strict=True):
                    tensor.add_(before)
            # After the last step they are home.
            sums = ring.start(own, step, _GRADIENTS)
            if coming is not None:
                held = coming.wait()
        assert sums is not None
        of_key, of_value = sums.wait()
        return (
            of_query.to(query.dtype),
            of_key.to(key.dtype),
            of_value.to(value.dtype),
            *(None,) * 6,
        )


def _at(tensor: torch.Tensor, rows: Span | None, tokens: Span) -> torch.Tensor:
    """A view of some tokens (dimension 2) of some rows."""
    part = tensor[:, :, tokens.start : tokens.stop]
    return part if rows is None else part[rows.start : rows.stop]


def _join(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Add the attention to more keys to what is there, in place."""
    both = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - both).unsqueeze(-1))
    out.addcmul_(part.to(out.dtype), torch.exp(part_lse - both).unsqueeze(-1))
    lse.copy_(both)


class _Ring:
    """Neighbours that pass tensors on."""

    def __init__(self, layout: SequenceLayout, group: dist.ProcessGroup) -> None:
        self.layout = layout
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def origin(self, step: int) -> int:
        """Whose keys are here in a step."""
        return (self.rank - step) % self.size

    def start(self, tensors: Sequence[torch.Tensor], step: int, tag: int) -> _Transfer:
        """Send what belongs to the keys of a step to the next rank, and receive what belongs to those of the next step."""
        if self.size == 1:
            return _Transfer(list(tensors), list(tensors), [])
        length = self.layout.sizes[self.origin(step + 1)]
        received = [t.new_empty(*t.shape[:2], length, t.shape[3]) for t in tensors]
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        # Nothing is sent of no tokens; both ends know the lengths.
        operations = [
            dist.P2POp(dist.isend, t, group=self.group, tag=tag, group_peer=after)
            for t in tensors
            if t.numel()
        ]
        operations += [
            dist.P2POp(dist.irecv, t, group=self.group, tag=tag, group_peer=before)
            for t in received
            if t.numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Transfer(received, list(tensors), works)


class _Transfer:
    """Tensors on their way. What is sent is kept until it has left."""

    def __init__(
        self, received: list[torch.Tensor], sent: list[torch.Tensor], works: Sequence[dist.Work]
    ) -> None:
        self._received, self._sent, self._works = received, sent, works

    def wait(self) -> list[torch.Tensor]:
        """What has come."""
        for work in self._works:
            work.wait()
        self._sent = []
        return self._received
