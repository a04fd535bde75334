"""The learning rate of each update, against Megatron-LM's scheduler as its loop drives it."""

from __future__ import annotations

import math

import pytest

from mm_core.training.schedule import LearningRate

GLOBAL_BATCH = 4


def megatron(updates: int, rate: LearningRate, batch: int = GLOBAL_BATCH) -> list[float]:
    """The rates of the first updates. Megatron-LM counts in samples and advances after each update."""
    warmup, decay = rate.warmup_steps * batch, rate.decay_steps * batch
    used, samples = [], 0
    for _ in range(updates):
        if warmup > 0 and samples <= warmup:
            lr = rate.warmup_init + (rate.peak - rate.warmup_init) * samples / warmup
        elif rate.style == "constant":
            lr = rate.peak
        elif samples > decay:
            lr = rate.minimum
        elif rate.style == "inverse-square-root":
            lr = max(rate.minimum, rate.peak * max(warmup, 1) ** 0.5 / max(samples, 1) ** 0.5)
        else:
            style, ratio = rate.style, (samples - warmup) / (decay - warmup)
            if style == "WSD":
                annealing = rate.wsd_decay_steps * batch
                style, ratio = rate.wsd_style, (samples - (decay - annealing)) / annealing
            left = 1.0
            if ratio > 0:
                left = {
                    "linear": 1 - ratio,
                    "cosine": 0.5 * (math.cos(math.pi * ratio) + 1),
                    "exponential": 2 * math.pow(0.5, ratio) - 1,
                    "minus_sqrt": 1 - math.sqrt(ratio),
                }[style]
            lr = rate.minimum + left * (rate.peak - rate.minimum)
        used.append(lr)
        samples += batch
    return used


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 19])
@pytest.mark.parametrize("decay", [20, 30])
@pytest.mark.parametrize(("minimum", "start"), [(0.0, 0.0), (1e-4, 5e-5)])
def test_every_update_has_megatrons_rate(
    style, warmup: int, decay: int, minimum: float, start: float
) -> None:
    rate = LearningRate(2e-3, minimum, style, warmup, start, decay)
    # Without a warm-up its inverse square root is of samples, so that the rate depends on the global batch.
    batch = 1 if style == "inverse-square-root" and not warmup else GLOBAL_BATCH
    theirs = megatron(40, rate, batch)
    assert [rate(step) for step in range(1, 41)] == pytest.approx(theirs, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("shape", ["exponential", "linear", "cosine", "minus_sqrt"])
@pytest.mark.parametrize("annealing", [1, 6, 20])
@pytest.mark.parametrize("warmup", [0, 5])
def test_wsd_has_megatrons_rates(shape, annealing: int, warmup: int) -> None:
    rate = LearningRate(2e-3, 1e-4, "WSD", warmup, 0.0, 20, shape, annealing)
    assert [rate(step) for step in range(1, 31)] == pytest.approx(megatron(30, rate), rel=1e-12, abs=1e-18)


def test_without_a_warm_up_the_inverse_square_root_counts_steps() -> None:
    rate = LearningRate(1.0, 0.0, "inverse-square-root", decay_steps=100)
    assert [rate(step) for step in (1, 2, 5, 101)] == pytest.approx([1.0, 1.0, 0.5, 0.1])


def test_the_ends() -> None:
    assert LearningRate(1.0, style="linear", decay_steps=10)(1) == 1.0
    assert LearningRate(1.0, style="cosine", decay_steps=10)(1) == 1.0
    assert LearningRate(1.0, 0.1, "cosine", decay_steps=10)(11) == 0.1
    assert LearningRate(1.0, 0.1, "linear", decay_steps=10)(1000) == 0.1
    warm = LearningRate(1.0, style="linear", warmup_steps=4, warmup_init=0.2, decay_steps=8)
    assert [warm(step) for step in (1, 3, 5, 7, 9)] == pytest.approx([0.2, 0.6, 1.0, 0.5, 0.0])


def test_a_run_of_one_step_learns() -> None:
    assert LearningRate(1e-3, style="linear", decay_steps=1)(1) == 1e-3


def test_warm_up_may_fill_the_whole_decay() -> None:
    rate = LearningRate(1.0, 0.1, "cosine", warmup_steps=5, decay_steps=5)
    assert [rate(step) for step in (5, 6, 7)] == pytest.approx([0.8, 1.0, 0.1])


def test_it_never_rises_after_the_warm_up_nor_falls_below_the_minimum() -> None:
    for style in ("linear", "cosine"):
        rates = [LearningRate(1.0, 0.05, style, 3, 0.0, 50)(step) for step in range(4, 80)]
        assert rates == sorted(rates, reverse=True)
        assert min(rates) == 0.05
