"""Sharded training is training: every way of it gives the losses and weights of plain torch in one process.

There are 52 224 ways (`legal_ways`). `make test` runs 20 of them, in which every two choices that can stand
together do so at least once; `make test-full` runs 54 more, with which every three do. A test's name says what is not
ordinary about its way.
"""

import re
from typing import Any

import numpy as np
import pytest

from tests.distributed import matrix
from tests.distributed.harness import run_ranks
from tests.distributed.matrix import FACTORS, VISION_LANGUAGE, Run, Way, covering_ways, reference, train

pytestmark = pytest.mark.timeout(120)
PAIRS, TRIPLES = covering_ways(2), covering_ways(3)
# Of Qwen3-VL with images and videos: every choice once, and (slow) every two.
IMAGES, IMAGES_PAIRS = covering_ways(1, VISION_LANGUAGE), covering_ways(2, VISION_LANGUAGE)

# Losses and norms of gradients of each step, relative; distance of all final weights, relative. AdamW takes nearly
# the same steps whatever the length of a gradient: that is what the norms are for.
BOUNDS = {"fp32": (1e-5, 1e-4, 1e-5), "bf16": (2e-2, 5e-2, 1e-3)}


def must_agree(way: Way) -> None:
    got: Run = run_ranks(train, way.ranks, way, timeout=100)[0]
    expected = reference(way.model, way.ignored)
    losses, norms, weights = BOUNDS[way.dtype]
    np.testing.assert_allclose(got.losses, expected.losses, rtol=losses)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=norms)
    assert relative_distance(got.weights, expected.weights) <= weights
    if way.dtype == "bf16":
        assert got.losses != expected.losses  # it did compute in bf16


def relative_distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Norm of the difference over all weights, relative to that of `b`."""
    assert a.keys() == b.keys()
    difference = sum(float(np.square(a[name] - b[name], dtype=np.float64).sum()) for name in b)
    return (difference / sum(float(np.square(b[name], dtype=np.float64).sum()) for name in b)) ** 0.5


@pytest.mark.parametrize("way", PAIRS, ids=str)
def test_parity(way):
    must_agree(way)


@pytest.mark.parametrize("way", IMAGES, ids=str)
def test_parity_with_images_and_videos(way):
    must_agree(way)


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in IMAGES_PAIRS if way not in IMAGES], ids=str)
def test_parity_of_two_with_images_and_videos(way):
    must_agree(way)


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in TRIPLES if way not in PAIRS], ids=str)
def test_parity_of_three(way):
    must_agree(way)


@pytest.mark.parametrize("model", [*FACTORS["model"], *VISION_LANGUAGE])
def test_the_bounds_are_far_below_what_training_changes(model):
    run = reference(model, False)
    moved = relative_distance(run.weights, matrix.initial_weights(model))
    assert moved > 100 * BOUNDS["fp32"][2]
    if model in FACTORS["model"]:  # those of the others are trained a few steps only
        assert moved > 4 * BOUNDS["bf16"][2]
    assert min(run.norms) > matrix.CLIP  # clipping has something to do
    assert len(run.losses) == matrix.steps_of(model)


@pytest.mark.parametrize(
    ("strength", "models"), [(2, FACTORS["model"]), (3, FACTORS["model"]), (2, VISION_LANGUAGE)]
)
def test_every_legal_combination_of_choices_is_run(strength, models):
    run = {
        combination
        for way in covering_ways(strength, models)
        for combination in matrix.combinations_of(way, strength)
    }
    assert run == set(matrix.combinations(strength, models))


def test_the_rules_allow_what_they_should_and_the_docstring_counts_right():
    ways = list(matrix.legal_ways())
    # The combinations are worked out from the rules alone; here from all ways there are, one by one.
    pairs = {combination for way in ways[::7] for combination in matrix.combinations_of(way, 2)}
    assert pairs == set(matrix.combinations(2))
    assert {way.ranks for way in ways if way.mesh == "hsdp"} == {4}
    assert {way.model for way in ways if way.experts == 2} == {"moe"}
    numbers = re.findall(r"\d+(?: \d{3})*", __doc__ or "")
    new = [way for way in TRIPLES if way not in PAIRS]
    assert [int(number.replace(" ", "")) for number in numbers] == [len(ways), len(PAIRS), len(new)]
    assert len(set(map(str, ways))) == len(ways)
