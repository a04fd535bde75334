"""The lifeline: how every rank of a job learns within moments that one of them failed, and which was the first.

Each rank keeps a connection to rank 0, on which a failing rank says why. A rank that is killed says nothing, but its
kernel closes the connection, or no longer answers when the machine is gone. Rank 0 waits a moment for what belongs
together, because peers of a dead rank fail at once in their collectives, and tells all ranks the first failure.
A rank whose main thread does not leave by itself then, for it stands in a collective, is ended by its lifeline.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.distributed as dist

from mm_core.training.meeting import LaunchError, Place, rank_0_left

log = logging.getLogger(__name__)

_GATHER = 0.7  # seconds in which rank 0 gathers what happened at once
_GRACE = 4.0  # seconds for the main thread to leave by itself
_LONGEST = 64 * 1024  # bytes of one message
_TEXT = 8192  # characters of one report; JSON makes at most 6 bytes of one
_GREETING = 1024  # bytes before a connection has shown that it is a rank's
_STRANGERS = 32  # connections that may be waiting to show it, beside one for each rank
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LOST = "its process ended without a word: it was killed, or its machine is gone"

#: How much a report tells, least first: an end of a connection, an exit code, an error.
Kind = Literal["lost", "follow-up", "ended", "error", "user"]
_TELLING = ("lost", "follow-up", "ended", "error", "user")


@dataclass(frozen=True)
class Failure:
    """What a rank reports.

    Attributes:
        rank, host: where.
        kind: `user`, a mistake of the user's; `error`; `ended`, seen by the parent of a rank; `follow-up`, a
            collective that broke, most likely because of another rank; `lost`, an end without a word.
        text: the message, with the traceback of an error.
    """

    rank: int
    host: str
    kind: Kind
    text: str

    @property
    def exit_code(self) -> int:
        return 2 if self.kind == "user" else 1

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}) failed first: {self.text}"


class Lifeline:
    """The connection of one rank, and on rank 0 the server of all.

    Args:
        place: of this rank.
        store: at which the ranks met; rank 0 leaves its address there.
        leave: called in a thread of its own with the first failure when the main thread did not call `close` in
            time; it has to end the process.
    """

    def __init__(self, place: Place, store: dist.Store, leave: Callable[[Failure], None]) -> None:
        self.rank, self.host = place.rank, socket.gethostname()
        self.first: Failure | None = None
        self._leave = leave
        self._told, self._closed = threading.Event(), threading.Event()
        self._sending = threading.Lock()
        self._server = _Server(place) if place.rank == 0 else None
        if self._server is not None:
            store.set("lifeline", json.dumps([*self._server.address, self._server.token]))
        try:
            host, port, token = json.loads(store.get("lifeline"))
        except dist.DistError as error:
            raise LaunchError(rank_0_left(place)) from error
        try:
            self._socket = socket.create_connection((host, port), timeout=60)
        except OSError as error:
            raise LaunchError(
                f"rank {self.rank} ({self.host}) cannot reach rank 0 at {host}, port {port} ({error}); the machines of a job "
                "must reach each other on any port. If this is the address of a wrong network, set --master-addr to the "
                "right one."
            ) from error
        _keep_alive(self._socket)
        # A copy in a forked process, such as one that loads data, would keep the connection of a dead rank open.
        os.register_at_fork(after_in_child=self._socket.close)
        self._send({"rank": self.rank, "host": self.host}, token.encode() + b" ")
        self._thread = threading.Thread(target=self._listen, name="lifeline", daemon=True)
        self._thread.start()

    def report(self, kind: Kind, text: str, *, rank: int | None = None) -> Failure:
        """Say that a rank failed, this one by default, and return the first failure of the job.

        It is this one when rank 0 does not answer in time.
        """
        if len(text) > _TEXT:  # an error's message is its first line, and its place the last ones
            text = f"{text[: _TEXT // 4]}\n…\n{text[-_TEXT // 2 :]}"
        mine = Failure(self.rank if rank is None else rank, self.host, kind, text)
        self._send({"failure": asdict(mine)})
        self._told.wait(_GATHER + 2.0)
        return self.first or mine

    @property
    def holds(self) -> bool:
        """Whether a failure would still be told."""
        return not self._closed.is_set()

    def close(self) -> None:
        """Leave in order: whatever ends now is no failure."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._send({"bye": True})
        if self._server is not None:
            self._server.close()
        self._socket.close()

    def abandon(self) -> None:
        """Leave the process to its main thread, which has told of the failure."""
        self._closed.set()

    def _send(self, message: dict[str, Any], greeting: bytes = b"") -> None:
        try:
            with self._sending:
                self._socket.sendall(greeting + _written(message))
        except OSError as error:
            log.debug("the lifeline is cut: %s", error)  # whoever reads at its end finds out, too

    def _listen(self) -> None:
        for message in _messages(self._socket):
            if "bye" in message:
                return
            if "first" in message:
                self.first = Failure(**message["first"])
                break
        else:
            self.first = Failure(0, "rank 0's machine", "lost", _LOST)
        self._told.set()
        if not self._closed.wait(_GRACE):
            self._leave(self.first)


class _Server:
    """Rank 0's side: hears every rank, and tells all of them the first failure.

    Its port is open to whoever reaches the machine. A connection is a rank's once its first line began with the token, which
    only the store of the job has; until then nothing of it is read but that line, and what it sends changes nothing.
    """

    def __init__(self, place: Place) -> None:
        self.token = secrets.token_hex(16)
        self._listener = _listener(place)
        self.address = (_own_address(place), self._listener.getsockname()[1])
        self._strangers = place.world_size + _STRANGERS
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._parts: dict[socket.socket, bytes] = {}
        self._ranks: dict[socket.socket, tuple[int, str]] = {}
        self._reports: list[Failure] = []
        self._until = 0.0
        self._stopping = threading.Event()
        os.register_at_fork(after_in_child=self._close_copies)
        self._thread = threading.Thread(target=self._serve, name="lifeline-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._tell({"bye": True})
        for connection in [*self._parts]:
            connection.close()
        self._listener.close()
        self._selector.close()

    def _close_copies(self) -> None:
        for connection in (*self._parts, self._listener):
            connection.close()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            for key, _ in self._selector.select(timeout=0.1):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._receive(key.fileobj)
            if self._reports and time.monotonic() > self._until:
                self._tell({"first": asdict(_first(self._reports))})
                return  # the connections stay open until the process ends: their end would mean that it was killed

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
            _keep_alive(connection)
        except OSError as error:  # it is gone again, or there are too many open files
            log.debug("a connection was not accepted: %s", error)
            time.sleep(0.01)
            return
        self._parts[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._parts) - len(self._ranks) > self._strangers:
            self._forget(next(other for other in self._parts if other not in self._ranks))

    def _receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_LONGEST)
        except OSError:
            data = b""
        if not data:
            if connection in self._ranks:
                rank, host = self._ranks[connection]
                self._note(Failure(rank, host, "lost", _LOST))
            self._forget(connection)
            return
        *lines, self._parts[connection] = (self._parts[connection] + data).split(b"\n")
        for line in lines:
            if connection not in self._ranks:
                token, _, line = line.partition(b" ")
                if not secrets.compare_digest(token, self.token.encode()):
                    self._forget(connection)  # no rank of this job
                    return
                message = _parsed(line)
                self._ranks[connection] = (int(message["rank"]), str(message["host"]))
                continue
            message = _parsed(line)
            if "bye" in message:
                del self._ranks[connection]
                self._forget(connection)
                return
            elif "failure" in message:
                self._note(Failure(**message["failure"]))
        if len(self._parts[connection]) > (_LONGEST if connection in self._ranks else _GREETING):
            self._forget(connection)

    def _note(self, failure: Failure) -> None:
        if not self._reports:
            self._until = time.monotonic() + _GATHER
        self._reports.append(failure)

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._parts.pop(connection)
        self._ranks.pop(connection, None)
        connection.close()

    def _tell(self, message: dict[str, Any]) -> None:
        text = _written(message)
        own = None
        for connection, (rank, _) in self._ranks.items():
            if rank == 0:
                own = connection
            else:
                _send_if_open(connection, text)
        if own is not None:  # last, because this process ends when it hears it
            _send_if_open(own, text)


def _first(reports: list[Failure]) -> Failure:
    """Of what happened within a moment, the first that is no follow-up, in the words that tell most about its rank."""
    causes = [report for report in reports if report.kind != "follow-up"] or reports
    same = [report for report in reports if report.rank == causes[0].rank]
    return max(same, key=lambda report: _TELLING.index(report.kind))


def _listener(place: Place) -> socket.socket:
    """A port of this machine, for other machines only if there are any."""
    if place.address in _LOOPBACK:
        family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
        return socket.create_server((place.address, 0), family=family, backlog=4096)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=both)


def _own_address(place: Place) -> str:
    """The address at which other machines reach this one: that of the network on which the job meets."""
    try:
        family, _, _, _, target = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = str(probe.getsockname()[0])
    except OSError:
        return place.address
    loopback = own.startswith("127.") or own == "::1"
    return place.address if loopback else own


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel notice within half a minute that the machine at the other end is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not everywhere under this name
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _messages(connection: socket.socket) -> Any:
    rest = b""
    while True:
        try:
            data = connection.recv(_LONGEST)
        except OSError:
            return
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from map(_parsed, lines)


def _written(message: dict[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode(errors="replace") + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _send_if_open(connection: socket.socket, text: bytes) -> None:
    try:
        connection.sendall(text)
    except OSError:
        log.debug("a rank left before it could be told")
