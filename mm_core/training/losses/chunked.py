"""Cross entropy of a linear layer's outputs, some rows at a time: logits of a large vocabulary never exist as a whole.

The gradients of a chunk are computed with its loss, while its logits are there, so that nothing is computed twice. torch has
the same as `torch.nn.functional.linear_cross_entropy` (from 2.13 on, for rows of one weight); the function here also takes
weights, tells the loss of each group of rows, and runs where ranks share the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_reduce, wait_tensor


def has_torch_kernel() -> bool:
    """Whether this torch has a chunked linear cross entropy of its own."""
    return hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")


def torch_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """The sum of the cross entropies of all rows, by torch's own operation.

    Args:
        hidden: `[T, H]`, T at least 1.
        weight, bias: `[V, H]` and `[V]`, of the dtype of `hidden`.
        targets: `[T]`, each from 0 to V - 1.
        chunk: rows that are computed together. Torch's own choice is very slow on a CPU.

    Returns:
        0-d, fp32 or fp64.
    """
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    loss = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="sum", options=options)
    return loss if loss.dtype == torch.float64 else loss.float()


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    owners: torch.Tensor,
    count: int,
    chunk: int,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Weighted sums of the cross entropies of the rows of each group.

    The gradient is that of the sum over all groups: `backward` refuses one that differs between them, since the gradient of
    the weight is not kept by group.

    Args:
        hidden: `[T, H]`, also with T = 0.
        weight, bias: `[V, H]` and `[V]`, of the dtype of `hidden`.
        targets: `[T]`, each from 0 to the size of the vocabulary less 1.
        weights: of the rows, `[T]` fp32.
        owners: to which group each row belongs, `[T]`, from 0 to `count - 1`.
        count: number of groups.
        chunk: rows that are computed together.
        group: ranks that share the vocabulary: each has V rows of the whole weight, those of rank r before those of rank
            r + 1, and the same `hidden`. Its gradient is then this rank's part of it. All of them call this.

    Returns:
        `[count]`, fp32 or, for fp64, fp64.
    """
    return _ChunkedCrossEntropy.apply(
        hidden, weight, bias, targets, weights, owners, count, chunk, group, torch.is_grad_enabled()
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        owners: torch.Tensor,
        count: int,
        chunk: int,
        group: dist.ProcessGroup | None,
        learning: bool,
    ) -> torch.Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        of_hidden, of_weight, of_bias = (needed and learning for needed in ctx.needs_input_grad[:3])
        ctx.of_hidden = torch.empty_like(hidden) if of_hidden else None
        # Added up over the chunks in fp32, whatever the dtype of the products.
        sum_weight = torch.zeros_like(weight, dtype=dtype) if of_weight else None
        sum_bias = torch.zeros_like(weight[:, 0], dtype=dtype) if of_bias else None
        # A CPU has no fast products of half precision in every layout. What `mm plan` traces stands for another device.
        real = type(weight) in (torch.Tensor, torch.nn.Parameter)
        exact = weight.to(dtype) if real and of_hidden and weight.device.type == "cpu" else weight
        losses = hidden.new_empty(len(hidden), dtype=dtype)
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: len(hidden[rows])])
            if bias is not None:
                logits += bias
            losses[rows], share = _losses(logits.to(dtype), targets[rows], group)
            if not (of_hidden or of_weight or of_bias):
                continue
            share *= weights[rows, None]  # the gradient of the logits
            if sum_bias is not None:
                sum_bias += share.sum(0)
            if ctx.of_hidden is not None:
                ctx.of_hidden[rows] = torch.mm(share.to(exact.dtype), exact)
            if sum_weight is not None:
                share = share.to(weight.dtype)
                if sum_weight.dtype == share.dtype:
                    torch.addmm(sum_weight, share.t(), hidden[rows], out=sum_weight)
                else:
                    sum_weight += torch.mm(share.t(), hidden[rows])
            del share
        ctx.of_weight = None if sum_weight is None else sum_weight.to(weight.dtype)
        ctx.of_bias = None if bias is None or sum_bias is None else sum_bias.to(bias.dtype)
        return losses.new_zeros(count).index_add(0, owners, losses * weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Of the ways to check without waiting for the device, torch makes none public.
        torch._assert_async(
            (gradient == gradient[0]).all(), "the groups of chunked_cross_entropy have different gradients"
        )
        given = [ctx.of_hidden, ctx.of_weight, ctx.of_bias]
        # In place: the weight's is as large as the weight. A second backward pass has nothing any more.
        ctx.of_hidden = ctx.of_weight = ctx.of_bias = None
        scale = gradient[0]
        return (*(None if one is None else one.mul_(scale.to(one.dtype)) for one in given), *[None] * 7)


def _losses(
    logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropies `[T]`, and their derivatives by the logits `[T, V]`, which take the place of these."""
    first, size = 0, logits.shape[1]
    if group is not None:
        first = dist.get_rank(group) * size
    own = (targets >= first) & (targets < first + size)
    places = torch.where(own, targets - first, 0)[:, None]
    largest = logits.amax(1, keepdim=True)
    if group is not None:
        largest = _over_ranks(largest, "max", group)
    logits -= largest
    picked = torch.where(own, logits.gather(1, places)[:, 0], 0)
    total = logits.exp_().sum(1)
    if group is not None:
        picked, total = _over_ranks(torch.stack([picked, total]), "sum", group)
    share = logits.div_(total[:, None])
    share.scatter_add_(1, places, -own.to(share.dtype)[:, None])
    return total.log() - picked, share


def _over_ranks(tensor: torch.Tensor, operation: str, group: dist.ProcessGroup) -> torch.Tensor:
    # In this form `mm plan` can trace it.
    reduced: torch.Tensor = wait_tensor(all_reduce(tensor, operation, group))
    return reduced
