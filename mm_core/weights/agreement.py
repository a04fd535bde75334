"""Steps that all ranks take together, and what they tell each other for it: if one fails, all of them raise, and the
message names the one.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from mm_core.weights.errors import CheckpointError, WeightsError
from mm_registry.errors import UserError

log = logging.getLogger(__name__)

# Elements of one message. gloo copies in threads of its own, and from 32768 elements on (torch's grain) such a copy is
# shared out to an OpenMP team, which that thread keeps: with more threads than cores libgomp no longer spins at
# barriers, and every parallel operation of the training takes longer from then on, on a CPU about 1.7 times.
_PIECE = 16384


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def ranks_agree(what: str, *, alone: bool = False, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a step on every rank and leave it together.

    Args:
        what: the step, for the message: `writing runs/a/checkpoints/iter_0000010`.
        alone: the other ranks are not here; errors are only put into words.
        group: of all ranks, with a gloo side; by default the default group.

    Raises:
        UserError: some rank raised a `UserError`; the message is that of the first one.
        CheckpointError: some rank failed otherwise; the message names the ranks and says why.
    """
    error: BaseException | None = None
    try:
        yield
    # It is raised below, on all ranks; a rank that raised at once would leave the others waiting. torch's own
    # CheckpointException is no Exception.
    except (Exception, CheckpointException) as caught:  # noqa: BLE001
        error = caught
    if error is not None and not _says_it_all(error):
        log.error("%s failed", what, exc_info=error)
    mine = None if error is None else (_is_mistake(error), _describe(error))
    reports = [mine] if alone else everywhere(mine, group)
    failures = {r: report for r, report in enumerate(reports) if report is not None}
    if not failures:
        return
    by_user = next((text for is_user, text in failures.values() if is_user), None)
    if by_user is not None:
        raise error if error is not None and _is_mistake(error) else WeightsError(by_user)
    if len(reports) == 1:
        raise CheckpointError(f"{what} failed: {failures[0][1]}") from error
    lines = list(dict.fromkeys(f"rank {r}: {text}" for r, (_, text) in failures.items()))
    raise CheckpointError(
        f"{what} failed on {len(failures)} of {len(reports)} ranks; {'; '.join(lines)}"
    ) from error


def everywhere(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank says, on every rank; for small things."""
    if world_size() == 1:
        return [mine]
    data, length, longest = _packed(mine, group)
    pieces: list[list[torch.Tensor]] = [[] for _ in range(world_size())]
    for first in range(0, longest, _PIECE):
        got = [torch.empty(min(_PIECE, longest - first), dtype=torch.int64) for _ in pieces]
        dist.all_gather(got, data[first : first + _PIECE], group=group)
        for all_of_rank, piece in zip(pieces, got, strict=True):
            all_of_rank.append(piece)
    return [_unpacked(parts, count) for parts, count in zip(pieces, length, strict=True)]


def at_rank_0(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """What each rank says, on rank 0; `None` on the others."""
    if world_size() == 1:
        return [mine]
    data, length, longest = _packed(mine, group)
    pieces: list[list[torch.Tensor]] = [[] for _ in range(world_size())]
    for first in range(0, longest, _PIECE):
        count = min(_PIECE, longest - first)
        got = [torch.empty(count, dtype=torch.int64) for _ in pieces] if rank() == 0 else None
        dist.gather(data[first : first + _PIECE], got, dst=0, group=group)
        for all_of_rank, piece in zip(pieces, got or [], strict=False):
            all_of_rank.append(piece)
    if rank() != 0:
        return None
    return [_unpacked(parts, count) for parts, count in zip(pieces, length, strict=True)]


def from_rank_0(values: Sequence[Any] | None, group: dist.ProcessGroup | None = None) -> Any:
    """The value that rank 0 has for this rank.

    Args:
        values: by rank, on rank 0; `None` on the others.
    """
    if world_size() == 1:
        assert values is not None
        return values[0]
    if rank() == 0:
        assert values is not None
        for to, value in enumerate(values[1:], start=1):
            data = pickle.dumps(value)
            count = -(-len(data) // 8)
            dist.send(torch.tensor([count, len(data)]), to, group=group)
            numbers = _numbers(data, count)
            for first in range(0, count, _PIECE):
                dist.send(numbers[first : first + _PIECE], to, group=group)
        return values[0]
    size = torch.empty(2, dtype=torch.int64)
    dist.recv(size, 0, group=group)
    count, length = size.tolist()
    parts = [torch.empty(min(_PIECE, count - first), dtype=torch.int64) for first in range(0, count, _PIECE)]
    for part in parts:
        dist.recv(part, 0, group=group)
    return _unpacked(parts, length)


def _packed(value: Any, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, list[int], int]:
    """A value as numbers, as many as the longest of all ranks; the lengths of all in bytes; and that many numbers."""
    # Between the processes of one job, as torch's own all_gather_object; never from a file.
    data = pickle.dumps(value)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    all_lengths = [int(one) for one in lengths]
    longest = -(-max(all_lengths) // 8)
    return _numbers(data, longest), all_lengths, longest


def _numbers(data: bytes, count: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data + bytes(8 * count - len(data))), dtype=torch.int64)


def _unpacked(parts: Sequence[torch.Tensor], length: int) -> Any:
    return pickle.loads(b"".join(part.numpy().tobytes() for part in parts)[:length])


def _is_mistake(error: BaseException) -> bool:
    """Whether a user can mend it; a `CheckpointError` is something that went wrong."""
    return isinstance(error, UserError) and not isinstance(error, CheckpointError)


def _says_it_all(error: BaseException) -> bool:
    """Whether the message tells what happened; anything else may be our own fault, and its traceback is wanted."""
    if isinstance(error, CheckpointException):
        return all(isinstance(reason, UserError | OSError) for reason, _ in error.failures.values())
    return isinstance(error, UserError | OSError)


def _describe(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        parts = [f"rank {r}: {type(e).__name__}: {e}" for r, (e, _) in error.failures.items()]
        return "; ".join(parts)
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
