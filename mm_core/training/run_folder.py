"""The folder of a run (`--save`): what lies where, who may write, and what a resumed run keeps.

    metrics.jsonl            one object an optimizer step
    config.json              the resolved configuration, with the origin of each value
    tensorboard/             event files
    logs/                    a file for each rank
    checkpoints/             iter_0000010/ …, latest
    .lock                    held by the live process
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from mm_registry.errors import UserError


class RunFolder:
    """A run's folder, opened by rank 0 alone.

    Raises:
        UserError: another live process holds the folder, it cannot be written, or it already holds another run's checkpoints.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self, *, continues: bool) -> None:
        """Create and lock the folder.

        Args:
            continues: the run goes on from a checkpoint of this very folder (`--load` names it too).
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise UserError(
                f"--save {self.path}: the run's folder cannot be written ({error.strerror}); name another folder."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise UserError(
                f"--save {self.path}: another process is training into this folder; wait for it, or name another folder."
            ) from error
        if not continues and self._complete_checkpoints():
            raise UserError(
                f"--save {self.path}: the folder already holds the checkpoints of a run; add `--load {self.path}` to continue it, "
                "or name another folder."
            )

    def _complete_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("iter_*/.complete"))

    def close(self) -> None:
        """Let the next process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Write `config.json` in one move."""
        write_json(self.config, resolved)

    def cut_metrics(self, step: int) -> None:
        """Keep the records up to `step` (that of the checkpoint; 0 for a fresh start).

        Later ones were written by a run that ended before its next checkpoint. They are moved to `logs/`, never deleted.
        """
        if not self.metrics.exists():
            return
        kept, dropped = [], []
        for line in self.metrics.read_text().splitlines(keepends=True):
            try:
                late = int(json.loads(line)["step"]) > step
            except (ValueError, KeyError, TypeError):
                late = True  # the torn last line of a killed process
            (dropped if late else kept).append(line)
        if not dropped:
            return
        number = 1
        while (aside := self.logs / f"metrics-after-step-{step}.{number}.jsonl").exists():
            number += 1
        _write_text(aside, "".join(dropped))
        _write_text(self.metrics, "".join(kept))


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside `path` first and rename it, so that a crash leaves the old file or the new one."""
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
