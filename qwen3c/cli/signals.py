"""Ctrl-C, SIGTERM and SIGHUP: a signal ends the program, ends the reply at hand, or is only noted.

All are built on answering(): a handler for some signals, for as long as a block runs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from ..system.terminal import write_at_once

if TYPE_CHECKING:
    import asyncio

# what asks a program to end -> what a person reads about it
ENDING = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "its terminal was closed"}


class Ended(KeyboardInterrupt):
    """A signal that ends the program, as an exception, so that open files are closed and temporary ones
    removed.
    """

    def __init__(self, number: int = signal.SIGINT, line: str = "") -> None:
        """line: what a person reads last, where that is more than the command would say."""
        super().__init__()
        self.number = number
        self.line = line
        self.word = ENDING[signal.Signals(number).name]
        self.status = 128 + number  # the shell's convention


@contextmanager
def answering(answer: Callable[[int, FrameType | None], None], *names: str) -> Iterator[None]:
    """Within, `answer` handles the named signals, but for those that are ignored already (nohup, `&`).

    At the end the old handlers are restored, except for a signal that got another handler meanwhile.
    """
    previous = {
        number: signal.getsignal(number)
        for number in (getattr(signal, name) for name in names if hasattr(signal, name))
    }
    heard = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]
    for number in heard:
        signal.signal(number, answer)
    try:
        yield
    finally:
        for number in heard:
            if signal.getsignal(number) is answer:
                signal.signal(number, previous[number])


@contextmanager
def ending() -> Iterator[None]:
    """Within, the first signal that asks the program to end raises Ended; later ones are ignored.

    A closed terminal sends two signals, and people press Ctrl-C again and again; cleaning up must not be
    disturbed.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for name in ENDING:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        raise Ended(number)

    with answering(end, *ENDING):
        yield


@contextmanager
def endings(ended: asyncio.Future[int]) -> Iterator[None]:
    """Within, the first signal that asks the program to end is the result of `ended`, and does nothing else.

    The event loop of `ended` is the one that runs.
    """
    loop = ended.get_loop()

    def hear(number: int) -> None:
        if not ended.done():
            ended.set_result(number)

    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    previous = {n: handler for n in numbers if (handler := signal.getsignal(n)) is not signal.SIG_IGN}
    for number in previous:
        loop.add_signal_handler(number, hear, number)
    try:
        yield
    finally:
        for number, handler in previous.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


@contextmanager
def leaving_at_once(name: str) -> Iterator[None]:
    """Within, a signal ends the process at once: an exception inside a library that loads could end as any
    error.

    name: the program's name, for its last line.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        ended = Ended(number)
        write_at_once(f"{name}: {ended.word}")
        os._exit(ended.status)

    with answering(leave, *ENDING):
        yield


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within, the yielded function returns True after the first Ctrl-C; a second one raises
    KeyboardInterrupt.
    """
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    with answering(handle, "SIGINT"):
        yield lambda: interrupted


@contextmanager
def endable() -> Iterator[Callable[[], int]]:
    """Within, the first SIGTERM or SIGHUP acts as Ctrl-C does; the yielded function returns its number, else
    0.

    Later ones are ignored, so that they do not disturb cleaning up.
    """
    number = 0

    def handle(received: int, frame: FrameType | None) -> None:
        nonlocal number
        if not number:
            number = received
            interrupt = signal.getsignal(signal.SIGINT)
            if not callable(interrupt):
                raise KeyboardInterrupt
            interrupt(signal.SIGINT, frame)

    with answering(handle, "SIGTERM", "SIGHUP"):
        yield lambda: number
