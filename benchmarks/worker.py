"""A process that times its work when told to, so that a benchmark can take turns between peers.

The parent writes a number n to the worker's standard input; the worker makes n steps and answers
with the seconds per step. While one worker is timed every other one waits for its input. Workers
start and compile side by side, and those on a GPU share its memory.
"""

import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

SHORTEST = 0.3  # seconds of a turn: of fewer a GPU's queue of work would be part


def serve(steps: Callable[[int], None]) -> None:
    """Warms up, says ready, and answers each number n on stdin with the time of `steps(n)`."""
    steps(3)
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        started = time.perf_counter()
        steps(count)
        print((time.perf_counter() - started) / count, flush=True)


class Worker:
    """A running worker.

    Args:
      command: starts a process that calls `serve`.
    """

    def __init__(self, command: Sequence[str]):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            text=True,
            bufsize=1,
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ,  # JAX takes 3/4 of a GPU
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._command, self._in, self._out = command, self._process.stdin, self._process.stdout

    def wait(self) -> None:
        """Waits until it has warmed up.

        Raises:
          RuntimeError: it ends before it is ready.
        """
        while (line := self._out.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"{' '.join(self._command)} ended before it was ready")

    def seconds_per_step(self, count: int) -> float:
        """Seconds for one of `count` steps."""
        self._in.write(f"{count}\n")
        return float(self._out.readline())

    def close(self) -> None:
        """Ends the process."""
        self._in.close()
        self._process.wait()
        self._out.close()


def take_turns(
    commands: dict[str, list[str]], turns: int, count: int, shortest: float = 0.0
) -> dict[str, list[float]]:
    """Seconds a step of each worker in each turn.

    Args:
      count: steps of a turn, at least.
      shortest: seconds that a turn of the first worker takes at least, by more steps.

    Raises:
      RuntimeError: a worker ends before it is ready.
    """
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(contextlib.closing(Worker(command)))
            for name, command in commands.items()
        }
        for worker in workers.values():
            worker.wait()
        if shortest:
            first = next(iter(workers.values())).seconds_per_step(count)
            count *= max(1, math.ceil(shortest / (count * first)))
        times: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(turns):
            for name, worker in workers.items():
                times[name].append(worker.seconds_per_step(count))
    return times


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and the lowest and the highest: "1.02 (0.97-1.10)"."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def milliseconds(seconds: Sequence[float]) -> str:
    """The median in milliseconds, to three digits."""
    median = 1e3 * statistics.median(seconds)
    return f"{median:.3g}" if median < 1000 else f"{median:.0f}"


def print_ratios(title: str, times: dict[str, list[float]], base: str) -> None:
    """One row for each worker: its median, and its ratio to `base`, pair by pair."""
    for name, seconds in times.items():
        ratios = [t / b for t, b in zip(seconds, times[base], strict=True)]
        print(f"| {title} | {name} | {milliseconds(seconds)} | {spread(ratios)} |", flush=True)
