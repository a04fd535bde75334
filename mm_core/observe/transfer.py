"""A bar of bytes for what takes long to read or write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_progress(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None] | None]:
    """Show a bar while something is read or written; it goes away at the end.

    Args:
        what: such as `reading weights/wan`.
        total: bytes.
        shown: false on all ranks but one.

    Yields:
        A function that takes numbers of bytes that were done; None where there is no terminal to show a bar on.
    """
    # Here, because importing rich.progress draws from Python's generator, and components import this file.
    from mm_core.observe.console import console

    if not shown or not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
        transient=True,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
