"""Handlers of SIGINT and SIGTERM for entry points; imports nothing slow, to work from the start."""

import os
import signal
from types import FrameType
from typing import Self


def end_on_interrupt(program: str) -> None:
    """Makes SIGINT end the process at once, with a sentence and status 130.

    A KeyboardInterrupt would not do: the start-up code of some C extensions swallows it, and other
    code turns it into pages of traceback.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        _end(program, signum)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background job
        signal.signal(signal.SIGINT, end)


class StopSignal:
    """Notes SIGINT and SIGTERM within a context, so that a run can save its state and stop.

    The object itself is the argument `stop` of `rezero_jax.training.loop.train`. Until the run
    first calls it there is nothing to save, so a signal ends the process at once; a second signal
    always does.

    Args:
      program: the name that begins the sentence of a process that ends at once.
    """

    def __init__(self, program: str):
        self._program = program
        self._signum = 0
        self._has_begun = False

    def __call__(self) -> int:
        """The number of the signal that arrived, or 0."""
        self._has_begun = True
        return self._signum

    def __enter__(self) -> Self:
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum:
            os._exit(128 + signum)
        if not self._has_begun:
            _end(self._program, signum)
        self._signum = signum
        os.write(2, b"\nstopping after this step and saving; a second signal stops at once\n")


def _end(program: str, signum: int) -> None:
    os.write(2, f"\n{program}: stopped\n".encode())
    os._exit(128 + signum)
