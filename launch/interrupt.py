"""Ctrl-C while a program starts; a light import, so that it holds from the first line."""

import os
import signal
from types import FrameType


def end_on_interrupt(program: str) -> None:
    """From here on SIGINT ends the process at once, with a sentence and status 130.

    Not by a KeyboardInterrupt: the start-up code of some C extensions swallows it, others turn it
    into pages of traceback.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        os.write(2, f"\n{program}: stopped\n".encode())
        os._exit(128 + signum)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background job
        signal.signal(signal.SIGINT, end)
