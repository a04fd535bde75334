"""What the ranks of a job settle before anything is built: the same plugins, the same files, nobody in error.

Each function is a collective, and where one rank has something to complain about, every rank raises.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from mm_core.config import TrainingJob
from mm_registry import default_manager
from mm_registry.agreement import describe_difference
from mm_registry.errors import UserError

_SHOWN = 8  # differences of one rank


class RankFailedError(RuntimeError):
    """Another rank failed while the job was prepared; the message has its words."""


def agree_on_plugins(mine: Mapping[str, Any]) -> None:
    """Compare this rank's plugin set with rank 0's, which every rank is sent.

    Args:
        mine: `default_manager().plugin_set()`, taken before a job's file could select among plugins.

    Raises:
        UserError: on every rank, when some rank sees other plugins than rank 0; it says which, and how they
            differ.
    """
    sent: list[Any] = [dict(mine)]
    dist.broadcast_object_list(sent, src=0)
    rank = dist.get_rank()
    different = describe_difference(sent[0], mine, here="on rank 0", there=f"on rank {rank}")
    if not different and sent[0] != mine:  # another version of the registry may note more than this one tells
        different = ["its plugin set has something that this version cannot name"]
    reports = _everywhere(different)
    lines = [
        f"rank {number} differs from rank 0: {'; '.join(_shortened(report))}."
        for number, report in enumerate(reports)
        if report
    ]
    if lines:
        _leave_together()
        raise UserError(
            "\n".join(
                [
                    "the ranks do not see the same plugins:",
                    *lines[:_SHOWN],
                    *([f"… and {len(lines) - _SHOWN} ranks more."] if len(lines) > _SHOWN else []),
                    "Install the same distributions everywhere, and set MM_PLUGINS and selection files alike "
                    "(compare `mm list` on each machine).",
                ]
            )
        )


def agree_on_job(job: TrainingJob) -> None:
    """Check that every rank read the same configuration, and selects the same plugins for it.

    Raises:
        UserError: on every rank, naming the ranks that differ from rank 0.
    """
    if dist.get_world_size() == 1:
        return
    text = default_manager().fingerprint() + json.dumps(job.resolved()["values"], sort_keys=True, default=str)
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).long()
    digests = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(digests, digest)
    odd = [i for i, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if odd:
        _leave_together()
        raise UserError(
            f"ranks {odd} read another configuration than rank 0; every machine needs the same files and flags."
        )


@contextmanager
def prepared_together() -> Iterator[None]:
    """Run a step that a rank may fail at by itself, and leave it together: a rank that failed raises what it
    raised, the others its message.

    Raises:
        UserError: another rank met a user's mistake.
        RankFailedError: another rank failed otherwise.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - raised below, when the others know
        error = caught
    if dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    mine = None if error is None else (isinstance(error, UserError), _describe(error))
    reports = {rank: report for rank, report in enumerate(_everywhere(mine)) if report is not None}
    if not reports:
        return
    _leave_together()
    if error is not None:
        raise error
    by_text: dict[str, list[int]] = {}
    for rank, (_, text) in reports.items():
        by_text.setdefault(text, []).append(rank)
    message = "\n".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items())
    if all(by_user for by_user, _ in reports.values()):
        raise UserError(message)
    raise RankFailedError(message)


def _everywhere(mine: Any) -> list[Any]:
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, mine)
    return reports


def _leave_together() -> None:
    """Let every rank know of the error before the first one leaves.

    A launcher that sees one process end sends SIGTERM to the others, which have the same message to print and the
    same exit code to leave with.
    """
    if threading.current_thread() is threading.main_thread():  # Python sets handlers there only
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.all_gather_object([None] * dist.get_world_size(), None)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _shortened(phrases: list[str]) -> list[str]:
    if len(phrases) <= _SHOWN:
        return phrases
    return [*phrases[:_SHOWN], f"and {len(phrases) - _SHOWN} more"]
