"""Signals that ask the command to end: it undoes what it did, says so, and ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from palimpsest.errors import Stopped

_USUAL: dict[int, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
"""What Python does on these signals if nobody asked for anything else."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `Stopped` inside, and SIGINT `KeyboardInterrupt`.

    Only the first signal is heard: those that follow would disturb the clean-up. Afterwards all
    is as before. A signal that somebody else handles is left to them (submitit's workers save
    their state on SIGTERM), and so is one that is ignored (as SIGHUP is under `nohup`). In another
    thread than the main one, where Python handles no signals, nothing is changed.
    """
    taken = [number for number, usual in _USUAL.items() if signal.getsignal(number) is usual]
    if threading.current_thread() is not threading.main_thread():
        taken = []
    heard: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if heard:
            return
        heard.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(signal.Signals(number).name)

    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, _USUAL[number])
