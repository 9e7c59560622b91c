"""Stopping in order: a signal asks, the loop saves at the next step boundary and exits with 75."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75  # "temporary failure, try again" (sysexits.h); schedulers requeue on it


class Interrupted(SystemExit):
    """The run stopped because a signal asked it to; it is saved and can be resumed."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.step = step


class StopRequest:
    """Whether a signal has asked for the end."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)  # asked twice: at once. Checkpoints are whole whenever this happens
        self.signum = signum


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen to SIGTERM and SIGINT inside; only the main thread can."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {s: signal.signal(s, request._receive) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
