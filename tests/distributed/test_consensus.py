"""What ranks settle before anything is built: if one has something to complain about, all of them raise."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from mm_core.config import ConfigError, Finding
from mm_core.training.consensus import RankFailedError, agree_on_plugins, prepared_together
from mm_registry.errors import UserError
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.timeout(120)

CORE = {"mmzoo-core": "0.1.0", "mmzoo-registry": "0.1.0"}
WAN = ["mm_core.predictor_models", "wandit", "mmzoo-plugin-wan22", "0.1.0", "wan:DiT"]
HAAR = ["mm_core.ae_models", "haar_video", "mmzoo-plugin-haar", "0.1.0", "haar:AE"]


def ended(step: Callable[[int], Any]) -> tuple[str, str]:
    """How a step ended on this rank: the error's class and text."""
    try:
        step(dist.get_rank())
    except Exception as error:  # noqa: BLE001 - what the tests compare
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_that_see_the_same_plugins_go_on(world: int) -> None:
    run = run_ranks(
        lambda: ended(lambda rank: agree_on_plugins({"core": CORE, "claims": [WAN, HAAR]})), world
    )
    assert run == [("", "")] * world


def test_every_rank_is_told_who_differs_and_how() -> None:
    claims = [[WAN, HAAR], [WAN, HAAR], [WAN], [["mm_core.predictor_models", "wandit", "fork", "2.0", "f:D"]]]
    results = run_ranks(
        lambda: ended(lambda rank: agree_on_plugins({"core": CORE, "claims": claims[rank]})), 4
    )
    assert len(set(results)) == 1
    kind, message = results[0]
    assert kind == "UserError"
    assert message.splitlines()[:3] == [
        "the ranks do not see the same plugins:",
        "rank 2 differs from rank 0: mmzoo-plugin-haar 0.1.0 is missing on rank 2.",
        "rank 3 differs from rank 0: fork 2.0 is on rank 3, but not on rank 0; mmzoo-plugin-haar 0.1.0 is missing "
        "on rank 3; mmzoo-plugin-wan22 0.1.0 is missing on rank 3; the predictor wandit comes from fork on rank 3 "
        "and from mmzoo-plugin-wan22 on rank 0.",
    ]
    assert "rank 1" not in message


def test_many_differences_are_cut_short() -> None:
    many = [["mm_core.ae_models", f"a{i}", f"plugin-{i:02}", "1.0", "p:A"] for i in range(40)]
    results = run_ranks(
        lambda: ended(lambda rank: agree_on_plugins({"core": CORE, "claims": many if rank == 0 else []})), 2
    )
    assert "plugin-07 1.0 is missing on rank 1; and 32 more." in results[0][1]
    assert len(results[0][1]) < 1000


def test_a_set_that_differs_beyond_words_is_not_let_through() -> None:
    results = run_ranks(
        lambda: ended(lambda rank: agree_on_plugins({"core": CORE, "claims": [], "more": rank})), 2
    )
    assert [kind for kind, _ in results] == ["UserError"] * 2


def test_a_mistake_of_one_rank_is_raised_on_all() -> None:
    def step(rank: int) -> None:
        with prepared_together():
            if rank == 1:
                raise ConfigError([Finding("error", "unknown-key", "no such key", "model.json", 3, 5)])

    assert run_ranks(lambda: ended(step), 3) == [
        ("UserError", "rank 1: model.json:3:5: no such key"),
        ("ConfigError", "model.json:3:5: no such key"),
        ("UserError", "rank 1: model.json:3:5: no such key"),
    ]


def test_a_mistake_that_all_make_is_each_ranks_own() -> None:
    def step(rank: int) -> None:
        with prepared_together():
            raise UserError("no --lr")

    assert run_ranks(lambda: ended(step), 2) == [("UserError", "no --lr")] * 2


def test_a_failure_that_is_no_mistake_of_the_users() -> None:
    def step(rank: int) -> None:
        with prepared_together():
            if rank < 2:
                raise MemoryError("1 TB")

    results = run_ranks(lambda: ended(step), 3)
    assert results[:2] == [("MemoryError", "1 TB")] * 2
    assert results[2] == (RankFailedError.__name__, "rank 0, 1: MemoryError: 1 TB")


def test_who_leaves_with_an_error_is_not_cut_short_by_the_launcher() -> None:
    """It sends SIGTERM to the others when the first process ends."""

    def step() -> list[bool]:
        ignored = []
        for claims in ([], [WAN] if dist.get_rank() else []):
            ended(lambda rank, c=claims: agree_on_plugins({"core": CORE, "claims": c}))
            ignored.append(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
        return ignored

    assert run_ranks(step, 2) == [[False, True]] * 2
