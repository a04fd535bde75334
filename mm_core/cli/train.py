"""`mm train`."""

from __future__ import annotations

import os
import sys

from mm_core.config import ConfigError, TrainFlags, load_training_job, parse_train_flags
from mm_core.config.environment import launched
from mm_core.config.flag_help import train_help
from mm_core.config.flag_parsing import read_command_line
from mm_core.config.flags import world_size
from mm_registry import default_manager
from mm_registry.errors import UserError


def run(argv: list[str]) -> int:
    """Check the whole job without torch, then build, shard and train it.

    One of several ranks under a launcher meets the others before it reads the job: what is wrong with one ends
    all of them. Where a command starts the ranks of one of several machines, it tells the others.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(train_help())
        return 0
    flags = None
    try:
        flags = _placed(_flags(argv))
        several = world_size(flags) > 1
        if not (several and launched()):
            _check_lock(flags)
            plugins = (
                default_manager().plugin_set() if several else None
            )  # before the job's file selects among them
            job = load_training_job(flags)
    except UserError as error:
        _tell_others(argv, flags, error)
        raise
    if several and launched():
        from mm_core.training.session import train_launched

        checked = flags
        return train_launched(checked, lambda: _check_lock(checked))
    from mm_core.training.session import train  # imports torch: only once everything written is right

    return train(job, argv, plugins)


def _placed(flags: TrainFlags) -> TrainFlags:
    """Return the flags with what SLURM says of this process."""
    from mm_core.training.slurm import join_slurm

    flags, variables = join_slurm(flags)
    os.environ.update(variables)  # for everything below, as torchrun does it
    return flags


def _tell_others(argv: list[str], flags: TrainFlags | None, error: UserError) -> None:
    """Let the ranks that wait for this one hear why it does not come, before their time-out."""
    if flags is None:
        try:
            flags = _placed(read_command_line(argv)[0])
        except UserError:  # told already, or of no use here
            return
    if world_size(flags) == 1 or flags.elastic:
        return
    from mm_core.training.launch import refuse_machine
    from mm_core.training.meeting import refuse

    if launched():
        refuse(str(error))
    else:
        refuse_machine(flags, str(error))


def _flags(argv: list[str]) -> TrainFlags:
    """Read the command line. If it is wrong, what is wrong with the files that it names is told with it."""
    try:
        return parse_train_flags(argv)
    except ConfigError:
        from mm_core.config.job import check_command_line

        raise ConfigError(check_command_line(argv)) from None


def _check_lock(flags: TrainFlags) -> None:
    """Refuse plugins that are not those of the lock, with `--locked`.

    Raises:
        UserError: they differ, or there is no lock.
    """
    if not flags.locked and flags.lock_file is None:
        return
    from mm_core.config.document import expanded
    from mm_registry.lock import NAME, require_lock

    require_lock(expanded(flags.lock_file or NAME), default_manager())
