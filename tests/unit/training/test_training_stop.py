"""SIGTERM is noted, passed on, and means what it did before once the run is over."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mm_core.training.stop import EXIT_TERMINATED, StopSignal


def test_the_exit_code_is_the_shells() -> None:
    assert EXIT_TERMINATED == 128 + signal.SIGTERM


def test_it_is_noted_and_passed_on() -> None:
    passed: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(lambda: passed.append(1)) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
    assert passed == [1, 1]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_old_handler_is_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="inside"), StopSignal():
        raise RuntimeError("inside")
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_can_use_it_without_effect() -> None:
    seen: list[bool] = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) == before
