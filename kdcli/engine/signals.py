"""Stopping from outside: SIGINT, SIGTERM and SIGUSR1 set a flag that the loop reads between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from kdcli.errors import Stopped

_GO_ON = "run the same command again to go on"


class _Leave(BaseException):
    """Raised where a signal finds the program: no `except Exception` on its way takes it for a damaged image."""


class StopFlag:
    """Whether, and with which exit code, the run should stop; 0 means go on."""

    def __init__(self, max_minutes: float | None, requeue: bool) -> None:
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.requeue = requeue
        self._signal = 0

    def receive(self, number: int, frame: Any) -> None:
        """The signal handler: it only notes the first signal."""
        self._signal = self._signal or number

    @property
    def signalled(self) -> bool:
        """Whether a signal came. Time alone does not end an evaluation, or one longer than the limit would never end."""
        return bool(self._signal)

    @property
    def code(self) -> int:
        """130 (SIGINT), 143 (SIGTERM; 75 with `--requeue`), 75 (SIGUSR1, or the time is up), else 0."""
        if self._signal == signal.SIGINT:
            return 130
        if self._signal == signal.SIGTERM:
            return 75 if self.requeue else 143
        if self._signal:
            return 75
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return 75
        return 0


def stopped(code: int, where: str) -> Stopped:
    """The exception for a stop with `code` after saving at `where`."""
    reason = {130: "interrupted", 143: "terminated"}.get(code, "stopped as asked")
    return Stopped(f"{reason}; saved {where}", code, hint=_GO_ON)


@contextlib.contextmanager
def listening(flag: StopFlag, *, at_once: bool = False) -> Iterator[None]:
    """Let `flag` receive the stop signals for the duration of the block (in the main thread; elsewhere nothing).

    Args:
        at_once: leave the block where the signal finds the program, which is right while nothing is being trained.

    Raises:
        Stopped: a signal came in a block that is to be left at once.
    """

    def leave(number: int, frame: Any) -> None:
        flag.receive(number, frame)
        raise _Leave

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    before = {name: signal.signal(name, leave if at_once else flag.receive) for name in names}
    try:
        yield
    except _Leave:
        raise stopped(flag.code, "all there was") from None
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
