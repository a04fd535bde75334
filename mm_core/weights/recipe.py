"""Recipes: how one tensor is made of others, with slices pushed down to them.

A folder may keep its tensors otherwise than the module does: one tensor per expert instead of all experts in one, a matrix
lying on its side, three projections in one. A recipe says how a tensor of one side is made of the other side's; read
from right to left (`inverted`) it says the opposite. Which part of which source a part of the result needs is
known without reading anything, so a rank reads the bytes of its own shards and no others.

Imports no torch: destinations are tensors, but only their methods are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from mm_core.weights.errors import WeightsError

if TYPE_CHECKING:
    import torch

Shape: TypeAlias = tuple[int, ...]
Box: TypeAlias = tuple[slice, ...]
"""One slice with start and stop, and no step, for each dimension."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A source's tensor as it is."""

    key: str


@dataclass(frozen=True, slots=True)
class Stack:
    """Parts of one shape along a new dimension `dim`, as `torch.stack` does it."""

    dim: int
    parts: tuple[Recipe, ...]


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts one after the other along `dim`, as `torch.cat` does it."""

    dim: int
    parts: tuple[Recipe, ...]


@dataclass(frozen=True, slots=True)
class Transposed:
    """Two dimensions exchanged."""

    a: int
    b: int
    part: Recipe


@dataclass(frozen=True, slots=True)
class Narrowed:
    """From `start` up to and without `stop` along `dim`: one piece of a `Concat`."""

    dim: int
    start: int
    stop: int
    part: Recipe


@dataclass(frozen=True, slots=True)
class Picked:
    """What is at `index` of `dim`, without that dimension: one part of a `Stack`."""

    dim: int
    index: int
    part: Recipe


Recipe: TypeAlias = Stored | Stack | Concat | Transposed | Narrowed | Picked


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one source, and where it goes.

    Attributes:
        key: the source.
        box: the part of it.
        target: a view into the destination, of the box's shape; in general not contiguous.
    """

    key: str
    box: Box
    target: torch.Tensor


def sources(recipe: Recipe) -> Iterator[str]:
    """The names of all tensors that a recipe takes, in its order."""
    match recipe:
        case Stored(key):
            yield key
        case Stack(_, parts) | Concat(_, parts):
            for part in parts:
                yield from sources(part)
        case Transposed(part=part) | Narrowed(part=part) | Picked(part=part):
            yield from sources(part)


def result_shape(recipe: Recipe, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of what a recipe makes.

    Args:
        shapes: of the sources.

    Raises:
        WeightsError: the parts do not go together, or a dimension or index is not there.
        KeyError: a source is not in `shapes`.
    """
    match recipe:
        case Stored(key):
            return tuple(shapes[key])
        case Stack(dim, parts):
            found = [result_shape(part, shapes) for part in parts]
            _need(bool(found) and 0 <= dim <= len(found[0]), recipe)
            for part, shape in zip(parts, found, strict=True):
                if shape != found[0]:
                    raise WeightsError(
                        f"{next(sources(part))} is {list(shape)}, and {next(sources(parts[0]))} is {list(found[0])}; "
                        "tensors that are stacked must have one shape"
                    )
            return (*found[0][:dim], len(parts), *found[0][dim:])
        case Concat(dim, parts):
            found = [result_shape(part, shapes) for part in parts]
            _need(bool(found) and 0 <= dim < len(found[0]), recipe)
            for part, shape in zip(parts, found, strict=True):
                if len(shape) != len(found[0]) or _without(shape, dim) != _without(found[0], dim):
                    raise WeightsError(
                        f"{next(sources(part))} is {list(shape)}, and {next(sources(parts[0]))} is {list(found[0])}; "
                        f"tensors that are put one after the other along dimension {dim} must agree in the others"
                    )
            return (*found[0][:dim], sum(shape[dim] for shape in found), *found[0][dim + 1 :])
        case Transposed(a, b, part):
            sizes = list(result_shape(part, shapes))
            _need(min(a, b) >= 0 and max(a, b) < len(sizes), recipe)
            sizes[a], sizes[b] = sizes[b], sizes[a]
            return tuple(sizes)
        case Narrowed(dim, start, stop, part):
            shape = result_shape(part, shapes)
            _need(0 <= dim < len(shape) and 0 <= start <= stop <= shape[dim], recipe)
            return (*shape[:dim], stop - start, *shape[dim + 1 :])
        case Picked(dim, index, part):
            shape = result_shape(part, shapes)
            _need(0 <= dim < len(shape) and 0 <= index < shape[dim], recipe)
            return _without(shape, dim)


def pieces(
    recipe: Recipe, shapes: Mapping[str, Shape], box: Box, destination: torch.Tensor
) -> Iterator[Piece]:
    """What to copy from where to make a part of what a recipe makes.

    Args:
        shapes: of the sources; the recipe fits them, as `result_shape` has found.
        box: the part of the result.
        destination: of the box's shape.
    """
    match recipe:
        case Stored(key):
            if all(s.stop > s.start for s in box):
                yield Piece(key, box, destination)
        case Stack(dim, parts):
            wanted = box[dim]
            for index in range(wanted.start, wanted.stop):
                inner = (*box[:dim], *box[dim + 1 :])
                yield from pieces(parts[index], shapes, inner, destination.select(dim, index - wanted.start))
        case Concat(dim, parts):
            wanted, begin = box[dim], 0
            for part in parts:
                end = begin + result_shape(part, shapes)[dim]
                first, last = max(wanted.start, begin), min(wanted.stop, end)
                if first < last:
                    inner = (*box[:dim], slice(first - begin, last - begin), *box[dim + 1 :])
                    view = destination.narrow(dim, first - wanted.start, last - first)
                    yield from pieces(part, shapes, inner, view)
                begin = end
        case Transposed(a, b, part):
            turned = list(box)
            turned[a], turned[b] = turned[b], turned[a]
            yield from pieces(part, shapes, tuple(turned), destination.transpose(a, b))
        case Narrowed(dim, start, _, part):
            inside = slice(box[dim].start + start, box[dim].stop + start)
            yield from pieces(part, shapes, (*box[:dim], inside, *box[dim + 1 :]), destination)
        case Picked(dim, index, part):
            inner = (*box[:dim], slice(index, index + 1), *box[dim:])
            yield from pieces(part, shapes, inner, destination.unsqueeze(dim))


def inverted(recipes: Mapping[str, Recipe], shapes: Mapping[str, Shape]) -> dict[str, Recipe]:
    """Turn recipes of one side's tensors into recipes of the other side's.

    Args:
        recipes: result -> how it is made; they fit the shapes.
        shapes: of the sources.

    Returns:
        Source -> how it is made of the results, for every source that a recipe takes.

    Raises:
        WeightsError: a part of a source is in no result, so it cannot be made again.
    """
    found: dict[str, list[tuple[Box, Recipe]]] = {}
    for name, recipe in recipes.items():
        whole = _whole(result_shape(recipe, shapes))
        if isinstance(recipe, Stored):
            found.setdefault(recipe.key, []).append((whole, Stored(name)))
            continue
        place: Any = _Place(
            Stored(name)
        )  # stands for the destination, and notes which part of it is asked for
        for piece in pieces(recipe, shapes, whole, place):
            target: Any = piece.target
            found.setdefault(piece.key, []).append((piece.box, target.recipe))
    return {key: _joined(key, tuple(shapes[key]), parts) for key, parts in found.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """A part of a tensor as a recipe, with the methods of a tensor that `pieces` uses."""

    recipe: Recipe

    def select(self, dim: int, index: int) -> _Place:
        return _Place(Picked(dim, index, self.recipe))

    def narrow(self, dim: int, start: int, length: int) -> _Place:
        return _Place(Narrowed(dim, start, start + length, self.recipe))

    def transpose(self, a: int, b: int) -> _Place:
        return _Place(Transposed(a, b, self.recipe))

    def unsqueeze(self, dim: int) -> _Place:
        return _Place(Stack(dim, (self.recipe,)))


def _joined(key: str, shape: Shape, parts: list[tuple[Box, Recipe]]) -> Recipe:
    """One recipe of a source's parts, which together are all of it and differ in one dimension only."""
    whole = _whole(shape)
    for box, recipe in parts:
        if box == whole:
            return recipe  # the others are further copies of the same values, such as tied weights
    cut = [dim for dim in range(len(shape)) if any(box[dim] != whole[dim] for box, _ in parts)]
    if len(cut) == 1:
        (dim,) = cut
        ordered = sorted(parts, key=lambda part: (part[0][dim].start, part[0][dim].stop))
        ends = [0, *(box[dim].stop for box, _ in ordered)]
        if ends[-1] == shape[dim] and all(
            box[dim].start == end for (box, _), end in zip(ordered, ends, strict=False)
        ):
            return Concat(dim, tuple(recipe for _, recipe in ordered))
    raise WeightsError(
        f"{key} cannot be written again: the model has only a part of it, or parts cut in several ways"
    )


def to_json(recipe: Recipe) -> Any:
    """A recipe as JSON: a string for `Stored`, else a list with the kind's name first."""
    match recipe:
        case Stored(key):
            return key
        case Stack(dim, parts):
            return ["stack", dim, *map(to_json, parts)]
        case Concat(dim, parts):
            return ["concat", dim, *map(to_json, parts)]
        case Transposed(a, b, part):
            return ["transposed", a, b, to_json(part)]
        case Narrowed(dim, start, stop, part):
            return ["narrowed", dim, start, stop, to_json(part)]
        case Picked(dim, index, part):
            return ["picked", dim, index, to_json(part)]


def from_json(value: Any) -> Recipe:
    """The inverse of `to_json`.

    Raises:
        WeightsError: it is no recipe.
    """
    match value:
        case str(key):
            return Stored(key)
        case ["stack", int(dim), _, *_]:
            return Stack(dim, tuple(map(from_json, value[2:])))
        case ["concat", int(dim), _, *_]:
            return Concat(dim, tuple(map(from_json, value[2:])))
        case ["transposed", int(a), int(b), part]:
            return Transposed(a, b, from_json(part))
        case ["narrowed", int(dim), int(start), int(stop), part]:
            return Narrowed(dim, start, stop, from_json(part))
        case ["picked", int(dim), int(index), part]:
            return Picked(dim, index, from_json(part))
    text = repr(value)
    raise WeightsError(f"{text if len(text) <= 80 else text[:79] + '…'} is no recipe of a tensor")


def _whole(shape: Shape) -> Box:
    return tuple(slice(0, size) for size in shape)


def _without(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], *shape[dim + 1 :])


def _need(fits: bool, recipe: Recipe) -> None:
    if not fits:
        first = next(sources(recipe), "nothing")
        raise WeightsError(
            f"{type(recipe).__name__} does not fit the shape of what it is made of ({first}, …)"
        )
