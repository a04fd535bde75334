"""Being asked to stop: SIGTERM ends a run after the step at hand, with one save."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells report it
_PATIENCE = 5.0  # seconds; a launcher and a parent may both pass one signal on


class StopSignal:
    """A context manager that notes SIGTERM instead of dying of it.

    Args:
        forward: called when the signal comes, to pass it on to child ranks.
    """

    def __init__(self, forward: Callable[[], None] | None = None) -> None:
        self.requested = False
        self._since = 0.0
        self._forward = forward
        self._old: object = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there only
            self._old = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if (
            self.requested and now - self._since > _PATIENCE
        ):  # whoever asks again does not want to wait for the step
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if not self.requested:
            self.requested, self._since = True, now
        if self._forward is not None:
            self._forward()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)  # type: ignore[arg-type]
