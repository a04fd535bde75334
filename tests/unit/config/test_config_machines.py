"""Flags that say how many machines there are, and how they find each other."""

from __future__ import annotations

import pytest

from mm_core.config import ConfigError, TrainFlags, parse_train_flags, world_size
from mm_core.config.flags import split_endpoint

_FIXED = ["--global-batch-size", "8", "--rdzv-endpoint", "head:29400", "--rdzv-id", "job"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def problem(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_train_flags(words)
    return str(caught.value)


def test_a_number_of_machines_or_a_range() -> None:
    assert TrainFlags().machines == (1, 1)
    assert parse_train_flags(["--nnodes", "2"]).machines == (2, 2)
    flags = parse_train_flags(["--nnodes", "1:4", "--nproc_per_node", "2", *_FIXED])
    assert flags.machines == (1, 4)
    assert world_size(flags) == 8, "the largest number is what must fit"
    for wrong in ("0", "abc", "1:", "1:2:3", "-1"):
        assert "must be a number of machines from 1, or MIN:MAX" in problem(f"--nnodes={wrong}")
    assert "4 is above 2. Use 2:4" in problem("--nnodes", "4:2", *_FIXED)
    assert "--node-rank: 2 must be below --nnodes 2" in problem("--nnodes", "2", "--node-rank", "2")


@pytest.mark.parametrize(
    ("words", "elastic"),
    [
        ("", False),
        ("--nnodes 2 --node_rank 1 --master_addr head --master_port 5", False),
        ("--rdzv_backend static --rdzv_endpoint head:5", False),
        ("--max-restarts 0", False),
        ("--max_restarts 3 --save run", True),
        ("--rdzv-backend c10d", True),
        ("--rdzv_endpoint head:29400", True),
    ],
)
def test_what_makes_a_job_elastic(words: str, elastic: bool) -> None:
    assert parse_train_flags(words.split()).elastic is elastic


def test_machines_need_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    several = ["--nnodes", "2", "--nproc-per-node", "2"]
    assert "2 machines need --master-addr" in problem(*several)
    assert "2 machines need --rdzv-endpoint" in problem(*several, "--rdzv-backend", "c10d", "--rdzv-id", "x")
    assert "need --rdzv-id, the same on each" in problem(*several, "--rdzv-endpoint", "head")
    monkeypatch.setenv("MASTER_ADDR", "head")
    parse_train_flags(several)
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    parse_train_flags(several)


def test_settings_of_the_rendezvous() -> None:
    flags = parse_train_flags(["--rdzv-conf", "join_timeout=30, last_call_timeout=5"])
    assert flags.elastic
    assert 'no setting "join_timeot"; did you mean join_timeout?' in problem("--rdzv-conf", "join_timeot=30")
    assert "needs a whole number from 1, such as timeout=60" in problem("--rdzv-conf", "timeout=soon")
    for wrong in ("head:99999", ":5", "head:port", "head:", "http://head:5", "::1", "[::1", "[::1]:x"):
        assert "is no HOST:PORT" in problem("--rdzv-endpoint", wrong)
    assert "in brackets" in problem("--rdzv-endpoint", "fe80::1:29400")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("head", ("head", None)),
        ("10.0.0.1:5", ("10.0.0.1", 5)),
        ("[::1]:29400", ("::1", 29400)),
        ("[fe80::1%eth0]", ("fe80::1%eth0", None)),
    ],
)
def test_where_machines_meet(text: str, parts: tuple[str, int | None]) -> None:
    assert split_endpoint(text) == parts


def test_the_address_of_a_machine() -> None:
    for right in ("head", "gpu_01-ib.example.org", "10.0.0.1", "::1", "fe80::1%eth0"):
        assert parse_train_flags(["--master-addr", right]).master_addr == right
    for wrong in ("head:29500", "http://head", "[::1]", "a b", "10.0.0.1:5"):
        assert "is no name and no address of a machine. The port goes to --master-port" in problem(
            "--master-addr", wrong
        )


def test_what_a_restart_needs() -> None:
    assert "needs --save" in problem("--max-restarts", "1")
    assert "need --global-batch-size" in problem(
        "--nnodes", "1:2", "--rdzv-id", "x", "--rdzv-endpoint", "head"
    )
    assert "static machines are a fixed number" in problem(
        "--nnodes", "1:2", "--rdzv-backend", "static", *_FIXED
    )
    assert "no multiple" in str(
        parse_train_flags(["--nnodes", "1:3", "--nproc-per-node", "2", *_FIXED]).check_batch(6)
    )
