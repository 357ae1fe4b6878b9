"""Ctrl-C at a chosen moment: SIGINT from another thread while a block runs in the main one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def interrupt_after(*delays_s: float, number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """Send the signal to this process that long after the block's begin, unless it has ended; again after each other."""
    over = threading.Event()

    def send() -> None:
        for delay_s in delays_s:
            if over.wait(delay_s):
                return
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()


@pytest.fixture
def python_s_handler() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, whatever runs the tests has made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the user's handler is back"
    finally:
        signal.signal(signal.SIGINT, before)
