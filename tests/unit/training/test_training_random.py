"""Keyed randomness: it depends on what it is for, and on nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.random import keyed_generator, keyed_normal, keyed_seed


def test_these_numbers_never_change() -> None:
    """A resumed run must meet the stream of the version that began it."""
    assert keyed_seed(1234, "noise", 0) == 11447980306543511059
    numbers = [-0.97359204, -1.04461431, 1.05813217, 1.57468081, 1.49979782, 0.20240010]
    assert keyed_normal(1234, "noise", [0, 7], (3,)).flatten().tolist() == pytest.approx(numbers, rel=1e-6)


@given(st.integers(0, 2**63 - 1), st.text(max_size=8), st.lists(st.integers(0, 2**40), max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_seed_has_64_bits_and_torch_takes_it(seed: int, purpose: str, index: list[int]) -> None:
    value = keyed_seed(seed, purpose, *index)
    assert 0 <= value < 2**64
    assert value == keyed_seed(seed, purpose, *index)
    keyed_generator(seed, purpose, *index)


def test_every_argument_counts() -> None:
    arguments: list[tuple[Any, ...]] = [
        (1, "noise"), (2, "noise"), (1, "noise", 0), (1, "noise", 1), (1, "noise", 0, 0), (1, "timestep", 0),
        (1, "nois", 0), (12, "noise", 3), (1, "noise", 23), (1, "noise", 2, 3), (11, "noise", 0), (1, "1noise", 0),
    ]  # fmt: skip
    assert len({keyed_seed(*a) for a in arguments}) == len(arguments)


def test_a_generator_is_the_same_each_time_and_its_own() -> None:
    first, second, other = (torch.rand(64, generator=keyed_generator(5, p, 3)) for p in ("a", "a", "b"))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    before = torch.get_rng_state()
    keyed_generator(5, "a", 3)
    keyed_normal(5, "a", [1], (4,))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


def test_normal_is_independent_of_order_and_batching() -> None:
    shape = (3, 4, 5)
    whole = keyed_normal(7, "noise", [10, 11, 12, 13], shape)
    assert whole.shape == (4, *shape)
    assert whole.dtype == torch.float32
    assert whole.is_contiguous()
    parts = torch.cat([keyed_normal(7, "noise", [10, 11], shape), keyed_normal(7, "noise", [12, 13], shape)])
    single = torch.cat([keyed_normal(7, "noise", [i], shape) for i in (10, 11, 12, 13)])
    turned = keyed_normal(7, "noise", [13, 12, 11, 10], shape).flip(0)
    for other in (parts, single, turned, keyed_normal(7, "noise", np.arange(10, 14), shape)):
        assert torch.equal(whole, other)


def test_a_longer_sample_begins_like_a_shorter_one_of_its_own_index_only() -> None:
    short, long = keyed_normal(7, "noise", [3], (50,)), keyed_normal(7, "noise", [3], (100,))
    assert torch.equal(short[0], long[0, :50])
    assert not torch.equal(short, keyed_normal(7, "noise", [4], (50,)))


def test_purposes_and_seeds_are_uncorrelated() -> None:
    count = 40_000
    rows = torch.cat(
        [
            keyed_normal(s, p, [i], (count,))
            for s, p, i in itertools.product((1, 2), ("noise", "other"), (0, 1))
        ]
    )
    correlation = torch.corrcoef(rows.double()) - torch.eye(len(rows), dtype=torch.float64)
    assert correlation.abs().max() < 5 / count**0.5


def test_it_is_standard_normal() -> None:
    draws = keyed_normal(3, "noise", range(64), (8192,)).double()
    count = draws.numel()
    assert abs(draws.mean().item()) < 5 / count**0.5
    assert draws.var().item() == pytest.approx(1.0, abs=5 * (2 / count) ** 0.5)
    for edge, share in ((-2.0, 0.02275), (-1.0, 0.15866), (0.0, 0.5), (1.0, 0.84134), (2.0, 0.97725)):
        assert (draws < edge).double().mean().item() == pytest.approx(
            share, abs=5 * (share * (1 - share) / count) ** 0.5
        )
    # between samples, as within them
    assert abs(draws.mean(0).var().item() * 64 - 1) < 0.1
    assert draws.abs().max() < 7


def test_no_stretch_is_repeated_across_indices() -> None:
    draws = keyed_normal(3, "noise", range(2000), (4,)).numpy()
    assert len({row.tobytes() for row in draws}) == 2000
    pairs = np.concatenate([draws[:, i : i + 2] for i in range(3)])  # any two neighbours: 64 bits
    assert len({pair.tobytes() for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("index", [0, 1, 2**32, 2**63])
def test_counters_of_neighbours_do_not_overlap(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[np.random.Philox] = []

    class Recorded(np.random.Philox):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(np.random, "Philox", Recorded)
    keyed_normal(3, "noise", [index], (1_000_000,))
    used, high, mine, top = (int(word) for word in made[0].state["state"]["counter"])
    assert 100_000 < used < 2**32, "the low word counts the blocks that were drawn"
    assert (high, mine, top) == (0, index, 0), "a sample stays 2^128 blocks away from the next one"


@pytest.mark.parametrize(("indices", "shape"), [([], (3,)), ([1, 2], ()), ([1], (0, 3))])
def test_degenerate_shapes(indices: list[int], shape: tuple[int, ...]) -> None:
    assert keyed_normal(1, "noise", indices, shape).shape == (len(indices), *shape)
