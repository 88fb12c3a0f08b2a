"""Starts processes on separate CPU cores and forwards signals to them."""

import os
import signal
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from types import FrameType
from typing import Any, Self


class Supervisor:
    """Forwards SIGINT and SIGTERM to its processes, which decide when to end.

    At the end of the context, processes that still run receive SIGTERM.

    Attributes:
      signum: the first signal received, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._old = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        self.send(signal.SIGTERM)
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def add(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Adds a process from `start` and returns it."""
        self._processes.append(process)
        if self.signum is not None:  # received while the process was starting
            process.send_signal(self.signum)
        return process

    def send(self, signum: int) -> None:
        """Sends a signal to all processes that still run."""
        for process in self._processes:
            process.send_signal(signum)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        self.send(signum)


def start(command: Sequence[str], cores: frozenset[int], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a process that may use only these cores; an empty set allows all of ours.

    The process has its own process group, because a terminal's Ctrl-C would otherwise reach it
    twice. `options` are passed to `subprocess.Popen`.
    """
    if not cores:
        return subprocess.Popen(command, process_group=0, **options)
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # inherited by the child before its threads start
    try:
        return subprocess.Popen(command, process_group=0, **options)
    finally:
        os.sched_setaffinity(0, ours)


def core_shares(count: int) -> list[frozenset[int]]:
    """Our cores, shared among `count` processes; empty sets if too few or not on Linux."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < count:
        return [frozenset()] * count
    bounds = [len(cores) * i // count for i in range(count + 1)]
    return [frozenset(cores[a:b]) for a, b in pairwise(bounds)]
