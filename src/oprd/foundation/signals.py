"""What Ctrl-C and a scheduler send: SIGINT, SIGTERM (Slurm's, and `kill`'s) and SIGUSR1."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A command that was stopped by a signal; `says` what it leaves and what the same command does.

    `by_all`: every rank stops so, at the same place.
    """

    def __init__(self, number: int, says: str = "", by_all: bool = False) -> None:
        super().__init__(says)
        self.number, self.says, self.by_all = number, says, by_all


def leave_at_once(number: int) -> None:
    """Raise `Stopped`."""
    raise Stopped(number)


@contextmanager
def signals_handled(handle: Callable[[int], None]) -> Iterator[None]:
    """Within the block this process calls `handle` with the number of a signal that comes.

    Signals that are ignored, as Ctrl-C is by background jobs, stay so, and processes forked from this one end
    as they would have. Does nothing outside the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def on_signal(number: int, _: FrameType | None) -> None:
        if os.getpid() == owner:
            handle(number)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
