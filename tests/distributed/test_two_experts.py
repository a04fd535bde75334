"""Two experts in one job: each sees its own noise levels, and learns what it would learn in a run of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.two_experts import BOUNDARY, plainly, trained, write_files

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]
STEPS, BATCH = 5, 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def apart(files: dict[str, str]) -> dict[str, Any]:
    return run_ranks(plainly, 1, files, STEPS, BATCH, 0.5)[0]


def check(result: dict[str, Any], apart: dict[str, Any]) -> None:
    for told, expected in zip(result["extra"], apart["log"], strict=True):
        shares = {name: expected.pop(name, 0) for name in ("high", "low")}
        for name, value in expected.items():
            assert told[name] == pytest.approx(value, rel=2e-4), name
        assert {n for n in told if n.startswith(("loss/", "grad_norm/"))} == set(expected)
        expected |= shares
    for name, value in apart["weights"].items():
        np.testing.assert_allclose(result["weights"][name], value, rtol=2e-3, atol=2e-5, err_msg=name)
    for name, value in result["ema"].items():
        np.testing.assert_allclose(value, apart["ema"][name], rtol=2e-3, atol=2e-5, err_msg=name)


def test_one_job_equals_two_single_runs_on_the_same_samples(
    files: dict[str, str], apart: dict[str, Any]
) -> None:
    """Counted as well: no expert sees a timestep of the other's."""
    shares = [(step.get("high", 0), step.get("low", 0)) for step in apart["log"]]
    assert any(0 in share for share in shares), (
        "a step must be of one expert alone, to show that the other rests"
    )
    assert any(0 not in share for share in shares)
    results = run_ranks(trained, 2, files, "--ema-decay", "0.5", steps=STEPS, batch=BATCH)
    for result in results:
        check(result, apart)
        high, low = result["timesteps"].values()
        assert min(high) >= 1000 * BOUNDARY > max(low)
        assert len(result["ema"]) == len(result["weights"])
    # What each saw, zero-weighted slots included, is what was dealt: nobody saw more than a full row beyond his share.
    seen = sum(len(one) for result in results for one in result["timesteps"].values())
    assert seen == sum(2 * (-(-share // 2)) for both in shares for share in both)


def equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["losses"] == theirs["losses"]
    for kind in ("weights", "ema"):
        assert ours[kind].keys() == theirs[kind].keys()
        for name, value in theirs[kind].items():
            np.testing.assert_array_equal(ours[kind][name], value, err_msg=name)


def test_an_idle_expert_in_host_memory_and_a_resumed_run_change_no_bit(
    tmp_path: Path, files: dict[str, str], apart: dict[str, Any]
) -> None:
    ema = ("--ema-decay", "0.5")
    whole = run_ranks(trained, 1, files, *ema, steps=STEPS, batch=BATCH)[0]
    check(whole, apart)
    away = write_files(tmp_path, offload_idle_predictor=True)
    save = str(tmp_path / "run")
    first = run_ranks(trained, 1, away, *ema, save=save, steps=2, batch=BATCH)[0]
    assert first["losses"] == whole["losses"][:2]
    # A step of one expert alone is among those of each part: the other's momenta are as they were.
    second = run_ranks(trained, 1, away, *ema, "--load", save, steps=STEPS, batch=BATCH)[0]
    equal({**second, "losses": first["losses"] + second["losses"]}, whole)


@pytest.mark.parametrize(
    ("ranks", "micro", "fsdp2", "more"),
    [
        (4, 1, {"sharding_size": 2}, ()),
        (4, 1, {"sharding_size": 2, "offload_idle_predictor": True}, ()),
        (2, 2, {"recompute_modules": ["predictor.blocks.{*}", "low_noise_predictor.blocks.{*}"]}, ()),
        (2, 2, {}, ("--context-parallel-size", "2")),
        (2, 1, {}, ("--encode-ahead",)),
    ],
)
def test_however_the_job_is_shared(
    tmp_path: Path,
    apart: dict[str, Any],
    ranks: int,
    micro: int,
    fsdp2: dict[str, Any],
    more: tuple[str, ...],
) -> None:
    shared = write_files(tmp_path, **fsdp2)
    sizes = {"steps": STEPS, "batch": BATCH, "micro": micro}
    for result in run_ranks(trained, ranks, shared, *more, timeout=150, **sizes):
        check(result, apart)
