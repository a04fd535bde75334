"""What can go wrong with weights on disk."""

from __future__ import annotations

from mm_registry.errors import UserError


class WeightsError(UserError):
    """A folder of weights or a checkpoint cannot be used as it is."""


class CheckpointError(UserError, RuntimeError):
    """Writing or reading a checkpoint failed on some rank; raised on every rank, and the message names the
    one that failed. A command ends with exit code 1: a full disk is nobody's wrong word.
    """

    exit_code = 1
