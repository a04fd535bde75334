"""`mm train`."""

from __future__ import annotations

import sys

from mm_core.config import load_training_job, parse_train_flags
from mm_core.config.flags import train_help


def run(argv: list[str]) -> int:
    """Check the whole job without torch, then build, shard and train it."""
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(train_help())
        return 0
    job = load_training_job(parse_train_flags(argv))
    from mm_core.training.session import train  # imports torch: only once everything written is right

    return train(job, argv)
