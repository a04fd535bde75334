"""Recipes: shapes, slices pushed down to the sources, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm_core.weights import WeightsError
from mm_core.weights.recipe import (
    Box,
    Concat,
    Narrowed,
    Picked,
    Recipe,
    Stack,
    Stored,
    Transposed,
    from_json,
    inverted,
    pieces,
    result_shape,
    sources,
    to_json,
)

GATES = Stack(0, tuple(Stored(f"gate.{i}") for i in range(4)))
UPS = Stack(0, tuple(Stored(f"up.{i}") for i in range(4)))
FUSED = Concat(1, (GATES, UPS))
RECIPES: dict[str, Recipe] = {
    "plain": Stored("a"),
    "fused": FUSED,
    "on its side": Transposed(1, 2, FUSED),
    "stacked last": Stack(2, (Stored("gate.0"), Stored("up.0"))),
    "picked": Picked(1, 2, Stored("a")),
    "narrowed": Narrowed(0, 2, 5, Transposed(0, 1, Stored("a"))),
    "deep": Narrowed(1, 1, 5, Transposed(0, 2, Picked(0, 1, Stack(1, (FUSED, FUSED))))),
}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"{kind}.{i}": torch.randn(3, 5) for kind in ("gate", "up") for i in range(4)}
    return made | {"a": torch.randn(3, 6, 2), "d": torch.randn(0, 4), "s": torch.randn(())}


def whole(recipe: Recipe, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a recipe makes, by torch's own functions."""
    match recipe:
        case Stored(key):
            return values[key]
        case Stack(dim, parts):
            return torch.stack([whole(part, values) for part in parts], dim)
        case Concat(dim, parts):
            return torch.cat([whole(part, values) for part in parts], dim)
        case Transposed(a, b, part):
            return whole(part, values).transpose(a, b)
        case Narrowed(dim, start, stop, part):
            return whole(part, values).narrow(dim, start, stop - start)
        case Picked(dim, index, part):
            return whole(part, values).select(dim, index)


def made(recipe: Recipe, values: dict[str, torch.Tensor], box: Box | None = None) -> torch.Tensor:
    shapes = {key: tuple(tensor.shape) for key, tensor in values.items()}
    box = box or tuple(slice(0, size) for size in result_shape(recipe, shapes))
    out = torch.full([part.stop - part.start for part in box], torch.nan)
    for piece in pieces(recipe, shapes, box, out):
        piece.target.copy_(values[piece.key][piece.box])
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_any_part_is_the_same_part_of_the_whole(name: str) -> None:
    recipe, values = RECIPES[name], tensors()
    expected = whole(recipe, values)
    assert result_shape(recipe, {key: tuple(t.shape) for key, t in values.items()}) == tuple(expected.shape)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        box = tuple(
            slice(*sorted(torch.randint(size + 1, (2,), generator=generator).tolist()))
            for size in expected.shape
        )
        assert torch.equal(made(recipe, values, box), expected[box])
    assert from_json(to_json(recipe)) == recipe


def test_only_what_is_needed_is_asked_for() -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors().items()}
    box = (slice(2, 3), slice(0, 3), slice(1, 4))
    (piece,) = pieces(FUSED, shapes, box, torch.empty(1, 3, 3))
    assert (piece.key, piece.box) == ("gate.2", (slice(0, 3), slice(1, 4)))


def test_the_way_back() -> None:
    recipes: dict[str, Recipe] = {
        "fused": Transposed(1, 2, FUSED),
        "first": Narrowed(1, 0, 2, Stored("a")),
        "rest": Transposed(0, 2, Narrowed(1, 2, 6, Stored("a"))),
        "empty": Stored("d"),
        "scalar": Stored("s"),
    }
    values = tensors()
    back = inverted(recipes, {key: tuple(tensor.shape) for key, tensor in values.items()})
    assert back.keys() == values.keys()
    results = {name: whole(recipe, values) for name, recipe in recipes.items()}
    for key, recipe in back.items():
        assert torch.equal(whole(recipe, results), values[key]), key


def test_what_is_not_whole_has_no_way_back() -> None:
    shapes = {"a": (3, 6, 2)}
    with pytest.raises(WeightsError, match="a cannot be written again: the model has only a part of it"):
        inverted({"x": Narrowed(1, 0, 2, Stored("a")), "y": Narrowed(1, 3, 6, Stored("a"))}, shapes)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Stack(0, (Stored("a"), Stored("b"))), r"b is \[3\], and a is \[2, 3\]; tensors that are stacked"),
        (Concat(1, (Stored("a"), Stored("c"))), r"c is \[4, 3\], and a is \[2, 3\]; .* must agree"),
        (Concat(2, (Stored("a"),)), "Concat does not fit"),
        (Stack(0, ()), "Stack does not fit"),
        (Transposed(0, 2, Stored("a")), "Transposed does not fit"),
        (Narrowed(0, 1, 3, Stored("a")), "Narrowed does not fit"),
        (Picked(0, 2, Stored("a")), "Picked does not fit"),
    ],
)
def test_recipes_that_do_not_fit(recipe: Recipe, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        result_shape(recipe, {"a": (2, 3), "b": (3,), "c": (4, 3)})


@pytest.mark.parametrize(
    "value", [3, None, [], ["stack", 0], ["stack", "0", "a"], ["spoilt", 1, "a"], ["picked", 1, 2]]
)
def test_what_is_no_recipe(value: Any) -> None:
    with pytest.raises(WeightsError, match="is no recipe of a tensor"):
        from_json(value)


def test_sources_are_in_order() -> None:
    assert list(sources(FUSED)) == [*(f"gate.{i}" for i in range(4)), *(f"up.{i}" for i in range(4))]
