"""Which checkpoints of a run stay: `--keep-last`, `--keep-every`."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_core.weights import layout

log = logging.getLogger(__name__)

_REMOVED = f"{layout.TEMPORARY}removed-"


@dataclass(frozen=True)
class Retention:
    """What is kept of a run's complete checkpoints; everything, by default.

    Args:
        last: so many of the newest ones.
        every: those whose step is a multiple of it, for good.
        protected: one that stays in any case, such as that from which the run goes on.
    """

    last: int | None = None
    every: int | None = None
    protected: Path | None = None

    def expired(self, complete: Sequence[Path]) -> list[Path]:
        """Those that go.

        Args:
            complete: all complete ones, oldest first.
        """
        if self.last is None:
            return []
        protected = None if self.protected is None else self.protected.resolve()
        return [
            folder
            for folder in complete[: -self.last]
            if not (self.every and layout.iteration_of(folder) % self.every == 0)
            and not folder.is_symlink()
            # Otherwise it is a name that somebody gave it.
            and folder.name == layout.folder_name(layout.iteration_of(folder))
            and folder.resolve() != protected
        ]

    def apply(self, checkpoints: Path, newest: Path) -> list[str]:
        """Remove what has expired; one process calls this, after the newest one was published.

        Each is renamed first, so that nobody ever finds half of one under a real name. What cannot be removed stays, and
        the log says so: the checkpoint that was just written is none the worse.

        Returns:
            The names of those that were removed.
        """
        last = layout.iteration_of(newest)
        removed: list[str] = []
        try:
            complete = [p for p in layout.complete_checkpoints(checkpoints) if layout.iteration_of(p) <= last]
            expired = self.expired(complete)
        except OSError as error:  # raised by one process alone, it would leave the other ranks waiting
            log.warning("older checkpoints stay: %s cannot be listed (%s)", checkpoints, error)
            return removed
        for folder in expired:
            doomed = folder.with_name(f"{_REMOVED}{folder.name}")
            try:
                if doomed.exists():
                    shutil.rmtree(doomed)
                os.rename(folder, doomed)
                layout.sync_folder(checkpoints)
                shutil.rmtree(doomed)
            except OSError as error:
                log.warning("%s is no longer needed, but cannot be removed: %s", folder, error)
            else:
                removed.append(folder.name)
        return removed
