"""A command on several ranks: those that a launcher started, or those that the command starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mm_core.config import TrainFlags
from mm_core.config.environment import launched, whole_number
from mm_registry import default_manager

if TYPE_CHECKING:
    import argparse

J = TypeVar("J")


def rank_count(options: argparse.Namespace) -> int:
    """How many ranks there are, or are to be started."""
    ranks = whole_number("WORLD_SIZE", 1) if launched() else options.nproc_per_node or 1
    return max(1, int(ranks))


def run_ranks(
    argv: Sequence[str],
    options: argparse.Namespace,
    load: Callable[[], J],
    work: Callable[[J], Any],
    command: str = "generate",
) -> Any:
    """Meet the other ranks, check the job on each of them, and work together; return what `work` does.

    The ranks agree on the plugins before an id means anything. A mistake that one of them finds in its files, and a
    failure of one, ends all of them.

    Args:
        argv: the command line after `mm generate`, for ranks that are started.
        load: reads and checks the job.
        work: what a rank does of it.
        command: whose command line it is.

    Raises:
        UserError: the ranks see different plugins, or the job is wrong on some rank.
    """
    from mm_core.training.consensus import prepared_together  # imports torch
    from mm_core.training.launch import LocalRanks, check_launch, die_with_parent
    from mm_core.training.membership import Membership

    # What generation says of ranks is said by flags of training, which have the same names.
    flags = TrainFlags.model_construct(nproc_per_node=options.nproc_per_node)
    check_launch(flags)
    die_with_parent()
    if launched():
        with Membership(flags) as member:
            member.join()
            with prepared_together():
                job = load()
            return _leave(work(job))
    plugins = default_manager().plugin_set()  # before the job's file selects among them
    job = load()  # what is wrong is said before a rank is started
    _check_devices(options.nproc_per_node)
    with LocalRanks(flags, argv, command) as children, Membership(flags, children) as member:
        member.join(plugins)
        with prepared_together():
            pass  # this rank is ready; the others load the job now
        return _leave(work(job))


def _check_devices(ranks: int) -> None:
    from mm_core.accelerator import Accelerator

    Accelerator.current().check_processes(ranks)


def _leave(result: Any) -> Any:
    """Leave the group in order; after a failure the peers may stand in a collective, and waiting would hang."""
    import torch.distributed as dist

    dist.destroy_process_group()
    return result
