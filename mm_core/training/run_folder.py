"""The folder of a run (`--save`): what lies where, who may write, and what a resumed run keeps.

- `metrics.jsonl`: one object an optimizer step
- `config.json`: the resolved configuration, with the origin of each value
- `tensorboard/`: event files
- `logs/`: a file for each rank, with what it logged and printed
- `checkpoints/`: iter_0000010/ …, latest
- `.lock`: held by the live process; it names the job, if that may start its ranks again
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from mm_core.weights import complete_checkpoints, remove_temporaries
from mm_core.weights.layout import TEMPORARY
from mm_registry.errors import UserError

_PATIENCE = 20.0  # seconds


class RunFolder:
    """A run's folder, opened by rank 0 alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._continues = False

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

    def belongs_to(self, job: str | None) -> bool:
        """Whether the job that wrote here last is this one, whose ranks were started again. Not to be asked while the
        folder is open: closing any descriptor of a file gives back the process's lock on it.
        """
        if job is None:
            return False
        try:
            return (self.path / ".lock").read_text(encoding="utf-8") == job
        except (OSError, ValueError):
            return False

    def open(self, *, continued: Path | None = None, job: str | None = None) -> list[str]:
        """Create and lock the folder, and remove what a crash left half written.

        Args:
            continued: the checkpoint of this very folder from which the run goes on; `None` for a run that
                starts anew, or from elsewhere.
            job: the name of a job that may start its ranks again. The ranks before may take a moment to go.

        Returns:
            Names of the half-written checkpoints that were removed.

        Raises:
            UserError: another live process holds the folder, it cannot be written, or it holds checkpoints
                that this run would have to overwrite.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._take_lock(self._lock, _PATIENCE if self.belongs_to(job) else 0.0)
            self._refuse_to_overwrite(continued)
            self._try_to_write_checkpoints()
            self._lock.truncate(0)
            self._lock.write(job or "")
            self._lock.flush()
        except UserError:
            self.close()
            raise
        self._continues = continued is not None
        return remove_temporaries(self.checkpoints)

    def _take_lock(self, file: IO[str], patience: float) -> None:
        deadline = time.monotonic() + patience
        try:
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
        except BlockingIOError as error:
            raise UserError(
                f"--save {self.path}: another process is training into this folder; wait for it, "
                "or name another folder."
            ) from error
        except OSError as error:
            raise UserError(
                f"--save {self.path}: the folder cannot be locked ({error.strerror}), so two runs could mix "
                "in it; name a folder on a file system that has locks."
            ) from error

    def _try_to_write_checkpoints(self) -> None:
        """Their folder may be a disk of its own; the first save would be late to know."""
        probe = self.checkpoints / f"{TEMPORARY}probe"
        if not self.checkpoints.exists():
            return
        try:
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"--save {self.path}: the run's folder cannot be written ({error.strerror}: {error.filename}); "
            "name another folder."
        )

    def _refuse_to_overwrite(self, continued: Path | None) -> None:
        """A complete checkpoint is never overwritten; better to say so now than after hours of training."""
        complete = complete_checkpoints(self.path)
        if not complete:
            return
        if continued is None:
            raise UserError(
                f"--save {self.path}: the folder already holds the checkpoints of a run; "
                f"add `--load {self.path}` to continue it, or name another folder."
            )
        names = [folder.name for folder in complete]
        later = names[names.index(continued.name) + 1 :] if continued.name in names else names
        if later:
            raise UserError(
                f"--load {continued}: {self.path} holds later checkpoints ({', '.join(later)}), which are not "
                f"overwritten; continue the newest one (`--load {self.path}`), save to another folder, "
                "or move them away."
            )

    def close(self) -> None:
        """Let the next process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Write `config.json` in one move. That of the part of the run before a resume is kept in `logs/`."""
        if self.config.exists():
            number = 1
            while (older := self.logs / f"config.{number}.json").exists():
                number += 1
            self.config.rename(older)
        write_json(self.config, resolved)

    def cut_metrics(self, step: int) -> None:
        """Keep the records up to `step`, that of the checkpoint from which this folder's run continues.

        Later ones were written by a run that ended before its next checkpoint; in a run that starts here
        anew or from elsewhere, all are another run's. They are moved to `logs/`, never deleted.
        """
        if not self.metrics.exists():
            return
        last = step if self._continues else 0
        kept: list[str] = []
        dropped: list[str] = []
        for line in self.metrics.read_bytes().decode(errors="replace").splitlines():
            try:
                late = int(json.loads(line)["step"]) > last
            except (ValueError, KeyError, TypeError):
                late = True  # the torn last line of a killed process
            (dropped if late else kept).append(line + "\n")
        if dropped:
            number = 1
            while (aside := self.logs / f"metrics-after-step-{last}.{number}.jsonl").exists():
                number += 1
            _write_text(aside, "".join(dropped))
        # Also without anything to drop: a record whose line end was torn off would swallow the next one.
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
