"""Which samples share a sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into as few sequences as a greedy choice finds: the longest first, each into the fullest sequence that
    has room for it (best fit decreasing; D. S. Johnson, "Near-optimal bin packing algorithms", 1973: at most 11/9 of the
    fewest, and 6/9 of one more).

    The same for the same lengths. Samples of length 0 are left out.

    Args:
        lengths: tokens of each sample, at most `capacity`.
        capacity: tokens of a sequence.

    Returns:
        Indices of the samples of each sequence, ascending; sequences in the order of their first samples.

    Raises:
        ValueError: a sample is longer than a sequence.
    """
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"sample {order[0]} has {lengths[order[0]]} tokens, more than {capacity}")
    with_room: dict[int, list[list[int]]] = {}  # room -> sequences that have so much left
    rooms: list[int] = []  # its keys, ascending
    for index in order:
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            sequence, room = [], capacity
        else:
            room = rooms[at]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        sequence.append(index)
        left = room - length
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(sequence)
    sequences = [sorted(sequence) for same in with_room.values() for sequence in same]
    return sorted(sequences, key=lambda sequence: sequence[0])
