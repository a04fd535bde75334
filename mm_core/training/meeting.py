"""How the ranks of a job meet, before there is a process group: each comes to one store, says who it is, and waits
for the others. A rank that cannot take part says so instead, and nobody waits for it until the time-out.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from mm_core.config.environment import read, whole_number
from mm_registry.errors import UserError

_SHOWN = 8  # ranks in a message
_PATIENCE = 30.0  # seconds for ranks that start a little later to hear why the job does not
_MACHINES = "compare --nnodes, --node-rank and --nproc-per-node on each machine"


class LaunchError(UserError):
    """The ranks cannot meet: a machine is out of reach, or one of them did not start."""

    exit_code = 1


@dataclass(frozen=True)
class Place:
    """Where this process is in the job, and where the job meets; from a launcher's variables."""

    rank: int
    world_size: int
    address: str
    port: int
    hosted: bool = False  # torchrun's agent keeps the store; else rank 0 does
    attempt: str = ""

    @classmethod
    def here(cls) -> Place:
        """The place of this process.

        Raises:
            UserError: a variable is missing, no number or out of range.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if not read(name)]
        if missing:
            raise UserError(
                f"The environment has {', '.join(name for name in names if read(name))} but not {', '.join(missing)}: "
                "start with torchrun, srun or --nproc-per-node, or unset them to run one process."
            )
        rank, world = whole_number("RANK", 0), whole_number("WORLD_SIZE", 1)
        if not 0 <= rank < world:
            raise UserError(f"RANK={rank} is outside WORLD_SIZE={world}.")
        return cls(
            rank,
            world,
            read("MASTER_ADDR") or "",
            whole_number("MASTER_PORT", 0),
            read("TORCHELASTIC_USE_AGENT_STORE") == "True",
            # A store that torchrun's agent keeps has the keys of the ranks before a restart, too.
            read("MM_ATTEMPT") or read("TORCHELASTIC_RESTART_COUNT") or "",
        )

    @property
    def hosts_store(self) -> bool:
        return self.rank == 0 and not self.hosted


def meet(place: Place, timeout: timedelta, *, refusal: str = "") -> dist.Store:
    """Wait for every rank of the job and return the store at which they met.

    Args:
        timeout: how long to wait for the others.
        refusal: why this rank cannot take part; the others raise it.

    Raises:
        LaunchError: the store is out of reach or goes away, or ranks did not come in time; the message names address and
            port, and who is missing.
        UserError: a rank refused to take part, two have the same number, they disagree on how many there are, or the
            address or the port is no good one.
    """
    store = dist.PrefixStore(f"mm/{place.attempt}", _open(place, timeout))
    try:
        return _meet_at(store, place, timeout, refusal)
    except dist.DistError as error:
        raise LaunchError(rank_0_left(place)) from error


def _meet_at(store: dist.Store, place: Place, timeout: timedelta, refusal: str) -> dist.Store:
    host = socket.gethostname()
    refusal = refusal or _misfit(store, place, host)
    if refusal:
        store.compare_set("refused", "", json.dumps([place.rank, host, refusal]))
    else:
        store.set(f"here/{place.rank}", host)
    came = store.add("came", 1)
    deadline = time.monotonic() + timeout.total_seconds()
    wait = 0.01
    while came < place.world_size and not store.check(["refused"]):
        if time.monotonic() > deadline:
            raise LaunchError(_missing(store, place, timeout))
        time.sleep(wait)
        wait = min(0.5, 1.5 * wait)
        came = store.add("came", 0)
    if store.check(["refused"]):
        rank, where, text = json.loads(store.get("refused"))
        _leave(store, place, min(_PATIENCE, timeout.total_seconds()))
        raise UserError(refusal or f"rank {rank} ({where}) cannot take part: {text}")
    return store


def refuse(text: str, place: Place | None = None, timeout: float = _PATIENCE) -> None:
    """Tell the ranks that were started beside this one that it cannot take part, if they are waiting for it.

    Whatever goes wrong is nothing to add to `text`, which this rank prints itself.

    Args:
        place: of this rank; by default that of a launcher's variables.
    """
    try:
        meet(place or Place.here(), timedelta(seconds=timeout), refusal=text)
    except UserError:  # this very refusal, or nobody to tell it to
        return


def _open(place: Place, timeout: timedelta) -> dist.Store:
    try:
        # The ranks count themselves in `meet`, which can tell who is missing.
        return dist.TCPStore(
            place.address, place.port, place.world_size, is_master=place.hosts_store, timeout=timeout,
            wait_for_workers=False, multi_tenant=place.hosts_store,
        )  # fmt: skip
    except dist.DistError as error:
        raise _unreachable(place, timeout, str(error)) from error


def rank_0_left(place: Place) -> str:
    """What a rank says whose store, which rank 0 or its launcher keeps, went away before the job began."""
    return (
        f"rank {place.rank} lost the connection to {place.address}, port {place.port}, while the job was starting: rank 0 "
        "or what started it has ended; look at what it printed."
    )


def _unreachable(place: Place, timeout: timedelta, detail: str) -> UserError:
    where = f"{place.address}, port {place.port}"
    if "EADDRINUSE" in detail or "address already in use" in detail:
        return UserError(
            f"--master-port {place.port}: another process of this machine has this port, perhaps another job, or this one "
            "started twice with the same --node-rank; choose another port, the same on each machine."
        )
    if "EADDRNOTAVAIL" in detail:
        return UserError(
            f"--master-addr {place.address}: rank 0 must run on this machine, which has no such address."
        )
    first = "" if place.rank else " This is rank 0, which serves there: is the address one of this machine?"
    return LaunchError(
        f"rank {place.rank} found nobody at {where}, within {_minutes(timeout)}: --master-addr and --master-port must be those "
        f"of the machine with --node-rank 0, where the job must have been started, and reachable from here.{first}"
    )


def _misfit(store: dist.Store, place: Place, host: str) -> str:
    """What speaks against this rank taking part, or the empty text."""
    world = int(store.compare_set("world", "", str(place.world_size)))
    if world != place.world_size:
        return (
            f"it was started as one of {place.world_size} ranks, and others as some of {world}; {_MACHINES} "
            "(or WORLD_SIZE, under a launcher)."
        )
    first = store.compare_set(f"rank/{place.rank}", "", f"{host}, process {os.getpid()}").decode()
    if first != f"{host}, process {os.getpid()}":
        return f"rank {place.rank} is there already ({first}); {_MACHINES}."
    return ""


def _missing(store: dist.Store, place: Place, timeout: timedelta) -> str:
    here, missing = set(), []
    for rank in range(place.world_size):
        if store.check([f"here/{rank}"]):
            here.add(store.get(f"here/{rank}").decode())
        else:
            missing.append(str(rank))
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing[:_SHOWN])}{more}"
    return (
        f"{ranks} of {place.world_size} did not come to {place.address}, port {place.port}, within {_minutes(timeout)}; those "
        f"that came run on {', '.join(sorted(here)[:_SHOWN])}. Look at what the missing ones printed, {_MACHINES}, and see "
        "that the port is open between the machines."
    )


def _leave(store: dist.Store, place: Place, patience: float) -> None:
    """Let everyone who came, or is about to, read the refusal before the store goes with its rank.

    A launcher that sees one process end sends SIGTERM to the others, which have something to say before they leave.
    """
    if threading.current_thread() is threading.main_thread():  # Python sets handlers there only
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    store.add("read", 1)
    deadline = time.monotonic() + patience
    while place.hosts_store and store.add("read", 0) < place.world_size and time.monotonic() < deadline:
        time.sleep(0.05)


def _minutes(timeout: timedelta) -> str:
    seconds = timeout.total_seconds()
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:g} minute{'' if seconds == 60 else 's'}"
