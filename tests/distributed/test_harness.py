"""The harness itself: results by rank, and failures that do not hang."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankError, run_ranks

pytestmark = pytest.mark.timeout(60)


def test_results_come_back_by_rank():
    def total() -> tuple[int, float]:
        value = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(value)
        return dist.get_rank(), value.item()

    assert run_ranks(total, 2) == [(0, 3.0), (1, 3.0)]


def test_a_rank_that_raises_fails_the_test_although_the_other_one_waits():
    def one_raises() -> None:
        if dist.get_rank() == 1:
            raise ValueError("rank one gives up")
        dist.barrier()

    started = time.monotonic()
    with pytest.raises(RankError, match="rank one gives up"):
        run_ranks(one_raises, 2, timeout=40)
    assert time.monotonic() - started < 20


def test_a_rank_that_dies_is_named():
    def one_dies() -> None:
        if dist.get_rank() == 0:
            os._exit(7)

    with pytest.raises(RankError, match="rank 0: died with exit code 7"):
        run_ranks(one_dies, 2)


def test_ranks_that_hang_are_stopped():
    with pytest.raises(RankError, match="did not finish within 1 s"):
        run_ranks(time.sleep, 1, 30, timeout=1)


def test_ranks_whose_connections_fail_meet_again(tmp_path, monkeypatch):
    real = dist.init_process_group

    def fails_once(*args: object, rank: int, **kwargs: object) -> None:
        marker = tmp_path / "failed"
        if rank == 1 and not marker.exists():
            marker.touch()
            raise RuntimeError("Gloo connectFullMesh failed")
        real(*args, rank=rank, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(dist, "init_process_group", fails_once)
    assert run_ranks(dist.get_rank, 2) == [0, 1]
    assert (tmp_path / "failed").exists()


def test_ranks_that_never_meet_say_why(monkeypatch):
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed")

    monkeypatch.setattr(dist, "init_process_group", fails)
    with pytest.raises(RankError, match="connectFullMesh failed"):
        run_ranks(dist.get_rank, 1)
