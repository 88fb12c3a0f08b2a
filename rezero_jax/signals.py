"""SIGINT and SIGTERM, noted rather than obeyed while there is something to finish first."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def noted(react: Callable[[list[int]], None] = lambda received: None) -> Iterator[list[int]]:
    """The signals received within the context, a list that grows as they arrive.

    Args:
      react: called with the list after each signal.
    """
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        react(received)

    old = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
