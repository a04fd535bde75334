"""Which tokens of a sequence each rank of a context-parallel group holds, and which of them see each other.

Plain arithmetic on numbers that the host knows; this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, TypeAlias

Documents: TypeAlias = tuple[tuple[int, ...], ...]
"""Of each row of a batch, where its packed documents begin and the last ends: `((0, 5, 12), (0, 12))`. One entry stands
for all rows."""


class Span(NamedTuple):
    """Tokens `start` to `stop` (exclusive)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class SequenceLayout:
    """How a sequence is cut.

    Args:
        spans: of each rank, the tokens that it holds, in the order in which it holds them. Together they are the
            sequence; a rank may have none.
    """

    spans: tuple[tuple[Span, ...], ...]

    @classmethod
    def contiguous(cls, length: int, ranks: int) -> SequenceLayout:
        """One piece a rank, whose lengths differ by one at most (as `torch.tensor_split`)."""
        return cls(tuple((span,) for span in _pieces(length, ranks)))

    @classmethod
    def balanced(cls, length: int, ranks: int) -> SequenceLayout:
        """Two pieces a rank, one of the beginning and one of the end, so that each has the same work where tokens see
        only those before them.
        """
        pieces = _pieces(length, 2 * ranks)
        return cls(tuple((pieces[rank], pieces[-1 - rank]) for rank in range(ranks)))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of tokens of each rank."""
        return tuple(sum(span.size for span in own) for own in self.spans)

    @property
    def length(self) -> int:
        """Number of tokens of the whole sequence."""
        return sum(self.sizes)

    @cached_property
    def order(self) -> tuple[Span, ...]:
        """The sequence as spans of the tokens of rank 0, rank 1, … one after another: what puts them in order again."""
        placed: list[tuple[Span, int]] = []
        offset = 0
        for own in self.spans:
            for span in own:
                placed.append((span, offset))
                offset += span.size
        return tuple(Span(at, at + span.size) for span, at in sorted(placed) if span.size)

    @property
    def in_order(self) -> bool:
        """Whether the tokens of rank 0, rank 1, … one after another are the sequence."""
        return all(one.stop == other.start for one, other in pairwise(self.order))


class Rectangle(NamedTuple):
    """Queries that see keys, both as the ranks hold them (counted from their first token).

    Args:
        rows: of the batch; None is all of them.
        queries, keys: every one of these sees every one of those;
        causal: or only those up to itself. Then there are as many queries as keys.
    """

    rows: Span | None
    queries: Span
    keys: Span
    causal: bool


def rectangles(
    layout: SequenceLayout,
    query_rank: int,
    key_rank: int,
    *,
    causal: bool,
    documents: Documents | None = None,
) -> list[Rectangle]:
    """Which queries of a rank see which keys of a rank.

    No query is in two rectangles with the same key, and what none names is not seen.

    Args:
        causal: tokens see themselves and those before them only.
        documents: tokens see those of their document only; None: there is one a row.
    """
    found = []
    for rows, bounds in _rows(documents or ((0, layout.length),)):
        own = [
            block
            for document in map(Span._make, pairwise(bounds))
            for block in _of_document(layout.spans[query_rank], layout.spans[key_rank], document, causal)
        ]
        found += [Rectangle(rows, *block) for block in _turned(_joined(_turned(_joined(own))))]
    return found


class _Block(NamedTuple):
    queries: Span
    keys: Span
    causal: bool


def _of_document(
    query_spans: Sequence[Span], key_spans: Sequence[Span], document: Span, causal: bool
) -> Iterator[_Block]:
    for queries, query_place in _inside(query_spans, document):
        for keys, key_place in _inside(key_spans, document):
            if not causal or keys.stop <= queries.start:
                yield _Block(query_place, key_place, False)
            elif keys == queries:
                yield _Block(query_place, key_place, True)
            else:
                # Spans of a layout are the same or have no token in common.
                assert queries.stop <= keys.start


def _inside(spans: Sequence[Span], document: Span) -> Iterator[tuple[Span, Span]]:
    """The parts of the spans that lie in a document: in the sequence, and as the rank holds them."""
    offset = 0
    for span in spans:
        start, stop = max(span.start, document.start), min(span.stop, document.stop)
        if start < stop:
            place = offset + start - span.start
            yield Span(start, stop), Span(place, place + stop - start)
        offset += span.size


def _joined(blocks: Iterable[_Block]) -> list[_Block]:
    """One block in place of two full ones that see the same keys and whose queries follow each other."""
    result: list[_Block] = []
    for block in sorted(blocks, key=lambda b: (b.causal, b.keys, b.queries)):
        last = result[-1] if result else None
        if (
            last is not None
            and not (last.causal or block.causal)
            and last.keys == block.keys
            and last.queries.stop == block.queries.start
        ):
            result[-1] = last._replace(queries=Span(last.queries.start, block.queries.stop))
        else:
            result.append(block)
    return result


def _turned(blocks: Iterable[_Block]) -> list[_Block]:
    """Queries and keys exchanged."""
    return [_Block(block.keys, block.queries, block.causal) for block in blocks]


def _rows(documents: Documents) -> Iterator[tuple[Span | None, tuple[int, ...]]]:
    """Rows of a batch that follow each other and are packed in the same way, with their bounds."""
    if len(set(documents)) == 1:
        yield None, documents[0]
        return
    first = 0
    for bounds, group in groupby(documents):
        number = len(list(group))
        yield Span(first, first + number), bounds
        first += number


def _pieces(length: int, number: int) -> list[Span]:
    short, longer = divmod(length, number)
    bounds = [0, *accumulate(short + (i < longer) for i in range(number))]
    return [Span(*pair) for pair in pairwise(bounds)]
