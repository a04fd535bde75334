"""How ranks meet, and how they leave when one of them fails: real processes, real kills, no training."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mm_core.config import TrainFlags
from mm_core.training.failures import describe, describe_exit
from mm_core.training.lifeline import Failure, Lifeline, _first
from mm_core.training.meeting import LaunchError, Place, meet
from mm_core.training.membership import Membership
from mm_registry.errors import UserError

pytestmark = pytest.mark.timeout(180)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Ranks:
    """Forked processes with a launcher's variables; `output(rank)` is what one printed."""

    def __init__(
        self, folder: Path, *ranks: Callable[[], None], world: int | None = None, numbers: Sequence[int] = ()
    ) -> None:
        self.folder = folder
        port = free_port()
        self.processes = []
        for number, (rank, function) in enumerate(zip(numbers or range(len(ranks)), ranks, strict=True)):
            variables = {
                "RANK": rank, "LOCAL_RANK": number, "WORLD_SIZE": world or len(ranks), "LOCAL_WORLD_SIZE": len(ranks),
                "MASTER_ADDR": "localhost", "MASTER_PORT": port, "MM_DEVICE": "cpu",
            }  # fmt: skip
            process = mp.get_context("fork").Process(target=self._run, args=(number, variables, function))
            process.start()
            self.processes.append(process)

    def _run(self, number: int, variables: dict[str, object], function: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        os.environ.update({name: str(value) for name, value in variables.items()})
        descriptor = os.open(self.folder / f"{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        from mm_core.cli import main

        code = 0
        try:
            function()
        except UserError as error:
            main._report(error)
            code = error.exit_code
        except Exception:  # noqa: BLE001 - as the command does it
            import traceback

            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)

    def codes(self) -> list[int | None]:
        try:
            # A process's sentinel, which `join` with a limit waits for, is held open by what it left behind too.
            deadline = time.monotonic() + 90
            while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
                time.sleep(0.02)
            return [process.exitcode for process in self.processes]
        finally:
            for process in self.processes:
                if process.is_alive():
                    process.kill()
                    process.join()

    def output(self, number: int) -> str:
        return (self.folder / f"{number}.txt").read_text()


def member(inside: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with Membership(TrainFlags(distributed_timeout_minutes=1)) as membership:
            membership.join()
            inside()
            dist.destroy_process_group()

    return run


def together() -> None:
    dist.all_reduce(torch.ones(1))


def stuck() -> None:
    """A main thread that no error reaches, as one in a collective of NCCL."""
    together()
    time.sleep(100)


def waiting() -> None:
    """A rank in a collective that another one will not join."""
    together()
    together()


# -- leaving


def test_ranks_that_leave_in_order(tmp_path: Path) -> None:
    def slow() -> None:
        together()
        time.sleep(1.5)  # after rank 0 is gone

    ranks = Ranks(tmp_path, member(together), member(slow))
    assert ranks.codes() == [0, 0]
    assert [ranks.output(number) for number in (0, 1)] == ["", ""]


def test_an_error_of_one_rank_ends_all_with_its_words(tmp_path: Path) -> None:
    def fails() -> None:
        together()
        raise ValueError("a tensor of the wrong colour")

    ranks = Ranks(tmp_path, member(waiting), member(fails), member(stuck))
    assert ranks.codes() == [1, 1, 1]
    first, failed, other = map(ranks.output, range(3))
    assert first.startswith(
        f"error: rank 1 ({socket.gethostname()}) failed first: ValueError: a tensor of the wrong colour\n"
    )
    assert "in fails" in first, "its traceback"
    assert "Connection closed" not in first, "what follows from it is no news"
    assert "ValueError: a tensor of the wrong colour" in failed
    assert "failed first" not in failed
    assert "rank 1" in other
    assert other.strip().count("\n") == 0, "one rank of a machine tells the whole story"


def test_a_killed_rank_ends_those_that_stand_still(tmp_path: Path) -> None:
    def killed() -> None:
        together()
        os.kill(os.getpid(), signal.SIGKILL)

    ranks = Ranks(tmp_path, member(stuck), member(stuck), member(killed))
    assert ranks.codes() == [1, 1, -signal.SIGKILL]
    assert "rank 2" in ranks.output(0)
    assert "ended without a word" in ranks.output(0)
    assert "rank 2" in ranks.output(1)


def test_processes_that_a_dead_rank_leaves_behind_do_not_hide_its_death(tmp_path: Path) -> None:
    """Such as those that load data, which were forked with all its connections."""

    def killed() -> None:
        together()
        child = os.fork()
        if child == 0:
            time.sleep(80)
            os._exit(0)
        (tmp_path / "child").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)

    def patient() -> None:
        together()
        time.sleep(60)  # and then it would leave in order

    for number, roles in enumerate([(member(patient), member(killed)), (member(killed), member(patient))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        codes = Ranks(folder, *roles).codes()
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
        assert sorted(map(str, codes)) == ["-9", "1"]


def test_rank_0_may_be_the_one_that_is_killed(tmp_path: Path) -> None:
    def killed() -> None:
        together()
        os.kill(os.getpid(), signal.SIGKILL)

    ranks = Ranks(tmp_path, member(killed), member(waiting), member(stuck))
    assert ranks.codes() == [-signal.SIGKILL, 1, 1]
    for number in (1, 2):
        assert "rank 0 (rank 0's machine) failed first" in ranks.output(number)


def test_a_mistake_of_the_users_on_one_rank(tmp_path: Path) -> None:
    def mistaken() -> None:
        together()
        raise UserError("data.json: clip 7 is missing on this machine.")

    ranks = Ranks(tmp_path, member(waiting), member(mistaken))
    assert ranks.codes() == [2, 2]
    assert "rank 1" in ranks.output(0)
    assert "clip 7 is missing" in ranks.output(0)
    assert ranks.output(1) == "error (rank 1): data.json: clip 7 is missing on this machine.\n"


# -- who is heard


@pytest.fixture
def line() -> Iterator[Lifeline]:
    """Rank 0's, on a machine of its own."""
    line = Lifeline(Place(0, 1, "127.0.0.1", 0), dist.HashStore(), lambda first: None)
    yield line
    line.close()


def test_a_stranger_changes_nothing(line: Lifeline) -> None:
    server = line._server
    assert server is not None
    assert server.address[0] == "127.0.0.1", "nobody outside reaches a job of one machine"
    failure = b'{"failure": {"rank": 0, "host": "", "kind": "error", "text": "no"}}\n'
    attacks = [
        '{"token": "é"}\n'.encode(), b"[" * 60_000 + b"\n", b"\xff\xfe \n\n", b"x" * 200_000, b"", failure,
        b"GET / HTTP/1.0\r\n\r\n", b'0 {"rank": 0, "host": "no"}\n' + failure, b"\n" + failure, b" " + failure,
    ]  # fmt: skip
    for attack in attacks:
        answer = b""
        with (
            socket.create_connection(server.address, timeout=10) as stranger,
            contextlib.suppress(ConnectionError),  # it may be gone before all of it is sent
        ):
            stranger.sendall(attack)
            with contextlib.suppress(OSError):  # or before it is told that this was all: ENOTCONN
                stranger.shutdown(socket.SHUT_WR)
            answer = stranger.recv(100)
        assert answer == b""
    crowd = [socket.create_connection(server.address, timeout=10) for _ in range(100)]
    assert not server._reports
    assert line.report("error", "mine").text == "mine"
    assert line.first is not None, "rank 0 answered"
    assert len(server._parts) < 50
    for stranger in crowd:
        stranger.close()


def test_a_long_report_keeps_its_first_line_and_its_end(line: Lifeline) -> None:
    text = "ValueError: wrong \ud800\n" + "\x1b\N{GRINNING FACE}错" * 50_000 + "\nthe last line"
    line.report("error", text)
    assert line.first is not None
    assert line.first.text.startswith("ValueError: wrong ?\n")
    assert line.first.text.endswith("\nthe last line")


# -- who failed first


def report(rank: int, kind: str, text: str = "") -> Failure:
    return Failure(rank, "host", kind, text)  # type: ignore[arg-type]


def test_follow_ups_are_not_the_first() -> None:
    assert _first([report(0, "follow-up"), report(1, "lost")]).rank == 1
    assert _first([report(0, "follow-up"), report(1, "follow-up")]).rank == 0


def test_the_words_that_tell_most_about_the_first_rank() -> None:
    killed, lost = report(1, "ended", "SIGKILL"), report(1, "lost")
    assert _first([report(0, "follow-up"), lost, report(2, "error"), killed]) == killed
    assert _first([report(1, "error", "why"), killed, lost]).text == "why"


def test_what_is_a_follow_up() -> None:
    gloo = RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3"
    )
    assert describe(gloo, 10)[0] == "follow-up"
    assert describe(ValueError("gloo"), 10)[0] == "error"
    assert describe(RuntimeError("shape mismatch"), 10)[0] == "error"
    assert describe(UserError("no"), 10) == ("user", "no")
    assert describe(LaunchError("no"), 10) == ("error", "no")
    kind, text = describe(
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms for recv"), 1
    )
    assert kind == "follow-up"
    assert "--distributed-timeout-minutes 1: some rank did not take part" in text


def test_exit_codes_in_words() -> None:
    assert describe_exit(1) == "exit code 1"
    assert "SIGKILL" in describe_exit(-9)
    assert "out of memory" in describe_exit(-9)
    assert describe_exit(-63).startswith("exit code -63")


# -- meeting


def meets(seconds: float = 30, refusal: str = "") -> Callable[[], None]:
    def run() -> None:
        meet(Place.here(), timedelta(seconds=seconds), refusal=refusal)

    return run


def test_nobody_at_the_address() -> None:
    port = free_port()
    with pytest.raises(
        LaunchError,
        match=rf"rank 1 found nobody at localhost, port {port}, within 2 seconds: .*--node-rank 0",
    ):
        meet(Place(1, 2, "localhost", port), timedelta(seconds=2))


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"--master-port {port}: another process of this machine has this port"
        ) as caught:
            meet(Place(0, 2, "localhost", port), timedelta(seconds=2))
        assert caught.value.exit_code == 2


def test_rank_0_goes_while_others_wait(tmp_path: Path) -> None:
    def goes() -> None:
        place = Place.here()
        store = dist.TCPStore(place.address, place.port, 3, is_master=True, wait_for_workers=False)
        while int(dist.PrefixStore("mm/", store).add("came", 0)) < 1:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    ranks = Ranks(tmp_path, goes, meets(60), world=3)
    assert ranks.codes() == [-signal.SIGKILL, 1]
    assert "rank 1 lost the connection to localhost" in ranks.output(1)
    assert "Traceback" not in ranks.output(1)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, meets(2), meets(2), world=4, numbers=(0, 2))
    assert ranks.codes() == [1, 1]
    assert "ranks 1, 3 of 4 did not come to localhost" in ranks.output(0)
    assert f"those that came run on {socket.gethostname()}" in ranks.output(0)


def test_two_with_the_same_number(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, meets(), meets(), meets(), world=3, numbers=(0, 1, 1))
    assert ranks.codes() == [2, 2, 2]
    assert "rank 1 is there already" in ranks.output(0)
    assert "--node-rank" in ranks.output(0)


def test_two_opinions_on_how_many_there_are(tmp_path: Path) -> None:
    def other() -> None:
        os.environ["WORLD_SIZE"] = "4"
        meets()()

    ranks = Ranks(tmp_path, meets(), meets(), other)
    assert ranks.codes() == [2, 2, 2]
    text = ranks.output(0)
    assert (
        "one of 4 ranks, and others as some of 3" in text or "one of 3 ranks, and others as some of 4" in text
    )


def test_a_rank_that_cannot_take_part_is_not_waited_for(tmp_path: Path) -> None:
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        roles = [meets(60, "--lr: no number"), meets(60)]
        ranks = Ranks(folder, *(roles if number == 0 else reversed(roles)))
        started = time.monotonic()
        assert ranks.codes() == [2, 2]
        assert time.monotonic() - started < 50
        assert f"rank {number} ({socket.gethostname()}) cannot take part: --lr: no number" in ranks.output(
            1 - number
        )
        assert "cannot take part" not in ranks.output(number), "it says so itself"


def test_all_have_the_same_mistake(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, meets(60, "--lr: no number"), meets(60, "--lr: no number"))
    assert ranks.codes() == [2, 2]
    for number in (0, 1):
        assert "--lr: no number" in ranks.output(number)
        assert "cannot take part" not in ranks.output(number)


def test_incomplete_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UserError, match="has RANK, WORLD_SIZE but not MASTER_ADDR, MASTER_PORT"):
        Place.here()
