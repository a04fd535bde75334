"""Steps that all ranks take together: if one fails, all of them raise, and the message names the one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from mm_core.weights.errors import CheckpointError, WeightsError
from mm_registry.errors import UserError


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def ranks_agree(what: str, *, alone: bool = False) -> Iterator[None]:
    """Run a step on every rank and leave it together.

    Args:
        what: the step, for the message: `writing runs/a/checkpoints/iter_0000010`.
        alone: the other ranks are not here; errors are only put into words.

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
    mine = None if error is None else (isinstance(error, UserError), _describe(error))
    reports = [mine]
    if not alone and world_size() > 1:
        reports = [None] * world_size()
        dist.all_gather_object(reports, mine)
    failures = {r: report for r, report in enumerate(reports) if report is not None}
    if not failures:
        return
    by_user = next((text for is_user, text in failures.values() if is_user), None)
    if by_user is not None:
        raise error if isinstance(error, UserError) else WeightsError(by_user)
    if len(reports) == 1:
        raise CheckpointError(f"{what} failed: {failures[0][1]}") from error
    lines = list(dict.fromkeys(f"rank {r}: {text}" for r, (_, text) in failures.items()))
    raise CheckpointError(
        f"{what} failed on {len(failures)} of {len(reports)} ranks; {'; '.join(lines)}"
    ) from error


def _describe(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        parts = [f"rank {r}: {type(e).__name__}: {e}" for r, (e, _) in error.failures.items()]
        return "; ".join(parts)
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
