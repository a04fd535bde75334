"""Laws of packing."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from mm_core.data.chat.packing import pack

CAPACITY = 50


@given(st.lists(st.integers(0, CAPACITY), max_size=60))
def test_laws(lengths: list[int]) -> None:
    packed = pack(lengths, CAPACITY)
    # Each sample that has a length is in one sequence, and none is too long.
    assert sorted(index for sequence in packed for index in sequence) == [
        i for i, n in enumerate(lengths) if n
    ]
    filled = [sum(lengths[index] for index in sequence) for sequence in packed]
    assert all(0 < tokens <= CAPACITY for tokens in filled)
    # Greedy: no two sequences would fit into one, so at most one is not filled to more than half.
    assert all(a + b > CAPACITY for a, b in combinations(filled, 2))
    assert packed == sorted(packed) == [sorted(sequence) for sequence in packed]
    assert packed == pack(lengths, CAPACITY)


def test_best_fit() -> None:
    # 9 to an empty one, 8 too, then 2 beside 8, which it fills, rather than beside nothing.
    assert pack([2, 8, 9], 10) == [[0, 1], [2]]
    assert pack([1, 8, 9], 10) == [[0, 2], [1]]
    assert pack([], 10) == []


def test_many() -> None:
    lengths = [1 + (i * 7919) % 1000 for i in range(50_000)]
    packed = pack(lengths, 4096)
    assert sum(lengths) / (len(packed) * 4096) > 0.999
