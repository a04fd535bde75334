"""Which tokens see each other, against a table of all pairs."""

from __future__ import annotations

from itertools import product

import pytest

from mm_core.sharding.sequence import Documents, SequenceLayout, rectangles

PACKINGS: list[Documents | None] = [None, ((0, 2, 3, 11),), ((0, 4, 11), (0, 4, 11), (0, 1, 2, 11))]


def _held(layout: SequenceLayout, rank: int) -> list[int]:
    return [token for span in layout.spans[rank] for token in range(span.start, span.stop)]


@pytest.mark.parametrize("cut", [SequenceLayout.contiguous, SequenceLayout.balanced])
@pytest.mark.parametrize("length", [0, 1, 3, 11, 16])
def test_each_token_is_held_once_and_ranks_have_about_as_many(cut, length):
    for ranks in (1, 2, 3, 4):
        layout = cut(length, ranks)
        held = [_held(layout, rank) for rank in range(ranks)]
        assert sorted(token for own in held for token in own) == list(range(length))
        assert layout.length == length
        assert layout.sizes == tuple(map(len, held))
        assert max(layout.sizes) - min(layout.sizes) <= 2
        joined = [token for own in held for token in own]
        assert [t for span in layout.order for t in joined[span.start : span.stop]] == list(range(length))
        assert layout.in_order == (joined == list(range(length)))


@pytest.mark.parametrize("cut", [SequenceLayout.contiguous, SequenceLayout.balanced])
@pytest.mark.parametrize("documents", PACKINGS)
@pytest.mark.parametrize("causal", [False, True])
def test_rectangles_hold_each_pair_that_sees_each_other_once(cut, documents, causal):
    length, rows = 11, 3
    per_row = documents * rows if documents is not None and len(documents) == 1 else documents
    for ranks in (1, 2, 3, 4):
        layout = cut(length, ranks)
        found: list[tuple[int, int, int]] = []
        for one, other in product(range(ranks), repeat=2):
            queries, keys = _held(layout, one), _held(layout, other)
            for block in rectangles(layout, one, other, causal=causal, documents=documents):
                for row in range(rows) if block.rows is None else range(*block.rows):
                    found += [
                        (row, queries[q], keys[k])
                        for q in range(*block.queries)
                        for k in range(*block.keys)
                        if not block.causal or k - block.keys.start <= q - block.queries.start
                    ]
        wanted = {
            (row, q, k)
            for row, q, k in product(range(rows), range(length), range(length))
            if (k <= q or not causal)
            and (per_row is None or sum(b <= q for b in per_row[row]) == sum(b <= k for b in per_row[row]))
        }
        assert sorted(found) == sorted(wanted)


def test_few_rectangles_are_computed():
    """A call of the kernel each; of a balanced causal ring one for another rank's keys, three for one's own."""
    layout = SequenceLayout.balanced(64, 4)
    numbers = [[len(rectangles(layout, one, other, causal=True)) for other in range(4)] for one in range(4)]
    assert numbers == [[3 if one == other else 1 for other in range(4)] for one in range(4)]
    assert len(rectangles(SequenceLayout.contiguous(64, 4), 0, 3, causal=True)) == 0
