"""What a person sees: the console, its log lines, and the progress of a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mm_core.observe.callback import BaseCallback, RunContext, StepRecord

log = logging.getLogger(__name__)
console = Console(stderr=True)
_SHOWN = "shown_on_console"


def setup_logging(rank: int, logs: Path | None = None) -> None:
    """Log to the console on rank 0, and on every rank to `logs/rank-00000.log` when a folder is given."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    if rank == 0:
        handler = RichHandler(console=console, show_path=False, markup=False, log_time_format="%H:%M:%S")
        handler.addFilter(lambda record: not getattr(record, _SHOWN, False))
        root.addHandler(handler)
    if logs is not None:
        file = logging.FileHandler(logs / f"rank-{rank:05d}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    for noisy in ("matplotlib", "PIL", "httpx", "torch.distributed.fsdp", "torch.distributed.checkpoint"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def show(text: str) -> None:
    """Print lines on the console as they are, and keep them in this rank's log file. For rank 0."""
    console.print(text, highlight=False, markup=False, soft_wrap=True, end="")
    log.info("%s", f"\n{text}".rstrip(), extra={_SHOWN: True})


def human_bytes(count: float) -> str:
    """`1.5 GiB`."""
    if count < 1023.5:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1023.95:  # what is rounded up to 1024.0 belongs to the next unit
            return f"{count:.1f} {unit}"
    count /= 1024
    return f"{count:.1f} TiB"


def human_count(count: float) -> str:
    """`1.2k`, `3.4M`, `14.3B`."""
    for unit in ("", "k", "M"):
        if count < 999.5:  # three digits would round it up to 1e+03
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}B"


def describe(record: StepRecord) -> str:
    """One step in one line."""
    parts = [
        f"loss {record.loss:.4f}",
        f"grad norm {record.grad_norm:.3f}",
        f"lr {record.lr:.2e}",
        f"{record.samples_per_second:.1f} samples/s",
        f"{human_count(record.tokens_per_second)} tokens/s",
        human_bytes(record.memory_bytes),
        *(f"{name} {value:.4g}" for name, value in record.extra.items()),
    ]
    return " · ".join(parts)


class ConsoleProgress(BaseCallback):
    """A live bar on a terminal; where there is none (a log file), one line every `--log-interval` steps.

    There is at most about one line a second.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._unsaid = 0.0  # seconds since the last line

    def on_train_start(self, context: RunContext) -> None:
        if not context.is_main or not console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            refresh_per_second=2,  # drawing takes CPU time from training where the CPU is the device
            transient=False,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            "train", total=context.last_step, completed=context.first_step, numbers=""
        )

    def on_step_end(self, context: RunContext, record: StepRecord) -> None:
        if not context.is_main:
            return
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, numbers=describe(record))
            return
        self._unsaid += record.seconds
        due = record.step % context.log_interval == 0 and self._unsaid >= 1.0
        if due or record.step in (context.first_step + 1, context.last_step):
            eta = (context.last_step - record.step) * record.seconds
            console.print(
                f"step {record.step}/{context.last_step} · {describe(record)} · ETA {eta:.0f} s",
                highlight=False,
                soft_wrap=True,
            )
            self._unsaid = 0.0
            sys.stderr.flush()

    def on_train_end(self, context: RunContext) -> None:
        if self._progress is not None:
            self._progress.stop()
