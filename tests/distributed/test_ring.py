"""Ring attention and Ulysses compute what one process computes, and its gradients."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm_core.sharding.block_attention import block_backward, block_forward
from mm_core.sharding.ring import ring_attention
from mm_core.sharding.sequence import Documents, SequenceLayout, rectangles
from mm_core.sharding.ulysses import ulysses_attention
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.timeout(120)
ROWS, WIDTH = 2, 8
PACKED = {13: ((0, 2, 3, 9, 13),), 3: ((0, 2, 3),)}
RAGGED = {13: ((0, 6, 13), (0, 1, 12, 13)), 3: ((0, 3), (0, 1, 3))}


def reference(
    tensors: list[torch.Tensor],
    causal: bool = False,
    documents: Documents | None = None,
    scale: float = WIDTH**-0.5,
    **_: Any,
) -> torch.Tensor:
    """Attention as the formula says it, with a mask over all pairs."""
    query, key, value = tensors
    length = query.shape[2]
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    seen = torch.ones(ROWS, 1, length, length, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if documents is not None:
        bounds = documents * (ROWS if len(documents) == 1 else 1)
        number = torch.stack([(torch.arange(length)[:, None] >= torch.tensor(b)).sum(-1) for b in bounds])
        seen = seen & (number[:, None, :, None] == number[:, None, None, :])
    scores = query @ key.transpose(-1, -2) * scale
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ value


def draw(length: int, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    numbers = [
        torch.randn(ROWS, n, length, WIDTH, generator=generator, dtype=torch.float64)
        for n in (heads, groups, groups, heads)
    ]
    return [t.to(dtype) for t in numbers]


def own_part(tensor: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    spans = layout.spans[dist.get_rank()]
    return torch.cat([tensor[:, :, span.start : span.stop] for span in spans], 2)


def differences(
    attention: Any,
    layout: SequenceLayout,
    heads: tuple[int, int],
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> list[float]:
    """Greatest difference of the result and of each gradient on this rank, relative to the greatest number."""
    length = layout.length
    *inputs, weights = draw(length, *heads, dtype)
    exact = [t.double().clone().requires_grad_() for t in inputs]
    wanted = reference(exact, **kwargs)
    (wanted * weights).sum().backward()
    own = [own_part(t, layout).requires_grad_() for t in inputs]
    found = attention(*own, layout, dist.group.WORLD, **kwargs)
    assert found.dtype == dtype
    (found * own_part(weights, layout)).sum().backward()
    pairs = [(found, wanted), *((t.grad, e.grad) for t, e in zip(own, exact, strict=True))]
    return [
        ((got.double() - own_part(want, layout)).abs().amax() / want.abs().amax()).item()
        if got.numel()
        else 0.0
        for got, want in pairs
    ]


def all_cases(
    attention: Any,
    layouts: list[Any],
    heads: list[tuple[int, int]],
    lengths: tuple[int, ...] = (13, 3),
    **kwargs: Any,
) -> dict[str, float]:
    """Greatest difference of each case, worst first."""
    found = {}
    for length, cut, numbers, causal, packing in product(
        lengths, layouts, heads, (False, True), (None, PACKED, RAGGED)
    ):
        documents = packing[length] if packing else None
        layout = cut(length, dist.get_world_size())
        result = differences(attention, layout, numbers, causal=causal, documents=documents, **kwargs)
        found[f"{length} {cut.__name__} {numbers} {causal} {documents}"] = max(result)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@pytest.mark.parametrize(
    ("world", "kernel"),
    [
        (1, "fused"),
        (2, "eager"),
        (3, "fused"),
        pytest.param(4, "eager", marks=pytest.mark.slow),
        (4, "fused"),
    ],
)
def test_ring_attention_is_attention(world, kernel):
    """13 tokens and 3, which no number of ranks here divides (of 3, a fourth rank has none); 3 heads and 6 over 2."""
    layouts = [SequenceLayout.contiguous, SequenceLayout.balanced]
    for found in run_ranks(
        all_cases, world, ring_attention, layouts, [(3, 3), (6, 2)], kernel=kernel, scale=0.5
    ):
        assert len(found) == 48
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ulysses_is_attention(world):
    """Also where the ranks do not divide the keys' heads."""
    heads = [(4, 4), (12, 6)]
    lengths = (3,) if world == 4 else (13,)  # of 3 tokens, the last rank has none
    for found in run_ranks(
        all_cases, world, ulysses_attention, [SequenceLayout.contiguous], heads, lengths, scale=0.5
    ):
        assert len(found) == 12
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("kernel", ["fused", "eager"])
def test_blocks_of_bf16_are_joined_in_fp32(kernel):
    """Not less exact over 4 ranks than on one: sums of 4 rounded parts would be."""

    def run() -> list[float]:
        layout = SequenceLayout.balanced(256, dist.get_world_size())
        return differences(ring_attention, layout, (2, 2), torch.bfloat16, causal=True, kernel=kernel)

    one = torch.tensor(run_ranks(run, 1)[0])
    four = torch.tensor(run_ranks(run, 4)).amax(0)
    assert (four < 1.25 * one).all(), (one, four)


def test_balanced_layouts_share_the_work_of_causal_attention():
    """Pairs that each rank computes: by halves of the beginning and the end the same, by one piece seven times as many."""

    def work(layout: SequenceLayout) -> list[int]:
        total = []
        for rank in range(4):
            blocks = [r for other in range(4) for r in rectangles(layout, rank, other, causal=True)]
            pairs = (b.queries.size * b.keys.size // (2 if b.causal else 1) for b in blocks)
            total.append(sum(pairs))
        return total

    assert len(set(work(SequenceLayout.balanced(64, 4)))) == 1
    uneven = work(SequenceLayout.contiguous(64, 4))
    assert uneven[3] == 7 * uneven[0]


def test_the_eager_form_holds_few_scores_at_once(monkeypatch):
    """Queries that are computed part by part give the same."""
    query, key, value, gradient = draw(13, 2, 2)
    how: dict[str, Any] = {"causal": True, "scale": 0.5, "kernel": "eager"}
    out, lse = block_forward(query, key, value, **how)
    whole = out, lse, *block_backward(gradient, query, key, value, out, lse, **how)
    monkeypatch.setattr("mm_core.sharding.block_attention._SCORES", 200)  # 3 queries
    out, lse = block_forward(query, key, value, **how)
    parts = out, lse, *block_backward(gradient, query, key, value, out, lse, **how)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
