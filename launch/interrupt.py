"""Handlers of SIGINT and SIGTERM for entry points, without slow imports."""

import os
import signal
from types import FrameType
from typing import Self


def end_on_interrupt(program: str) -> None:
    """Makes SIGINT end the process immediately, with a message and status 130.

    A KeyboardInterrupt would not do: some C extensions swallow it when they start, and
    elsewhere it prints pages of traceback.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        _end(program, signum)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored in a background job
        signal.signal(signal.SIGINT, end)


class StopSignal:
    """Records SIGINT and SIGTERM within a context, so that a run can save its state and stop.

    The object is the argument `stop` of `rezero_jax.training.loop.train`. A signal before the run
    first calls the object ends the process immediately, because there is nothing to save. A second
    signal always does.

    Args:
      program: name of the program in the message of a process that ends immediately.
    """

    def __init__(self, program: str):
        self._program = program
        self._signum = 0
        self._has_begun = False

    def __call__(self) -> int:
        """The number of the received signal, or 0."""
        self._has_begun = True
        return self._signum

    def __enter__(self) -> Self:
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        # A terminal that is closed does not stop a run.
        self._old[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
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
        os.write(2, b"\nsaving and stopping after this step; a second signal stops immediately\n")


def _end(program: str, signum: int) -> None:
    os.write(2, f"\n{program}: stopped\n".encode())
    os._exit(128 + signum)
