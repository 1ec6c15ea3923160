"""Signals as requests to stop."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from retinanet.interrupts import stop_on_signal


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)  # 128 + 2, 128 + 15
def test_stop_on_signal_first_signal_is_a_request(number: signal.Signals, exit_code: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(5)
        assert (stop.received, stop.exit_code) == (number, exit_code)
        with pytest.raises(KeyboardInterrupt):  # the second one ends the program
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(number) == before


def test_stop_on_signal_in_another_thread_is_never_set() -> None:
    found: list[bool] = []

    def run() -> None:
        with stop_on_signal() as stop:
            found.append(stop.is_set())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
