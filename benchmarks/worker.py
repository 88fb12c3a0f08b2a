"""Worker processes that time their work on request, so that programs are timed in alternation.

The parent writes a number n to the worker's standard input; the worker runs n steps and prints the
seconds per step. While one worker is timed, the others wait for input. Workers start and compile
concurrently; workers on a GPU share its memory.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

SHORTEST = 0.3  # minimum seconds per turn; a GPU's queue would distort shorter ones
PROMPT = 16  # bytes that generation continues


def serve(steps: Callable[[int], None], cost: Mapping[str, float] | None = None) -> None:
    """Warms up, prints `cost` and "ready", and answers each n on stdin with the time per step."""
    steps(3)
    print(json.dumps(cost or {}))
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

    def wait(self) -> dict[str, float]:
        """Waits until the worker has warmed up, and returns its `cost`.

        Raises:
          RuntimeError: the worker ended before it was ready.
        """
        last = ""
        while (line := self._out.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"{' '.join(self._command)} ended before it was ready")
            last = line
        return json.loads(last)

    def seconds_per_step(self, count: int) -> float:
        """Seconds per step of `count` steps."""
        self._in.write(f"{count}\n")
        return float(self._out.readline())

    def close(self) -> None:
        """Ends the process."""
        self._in.close()
        self._process.wait()
        self._out.close()


def take_turns(
    commands: dict[str, list[str]], turns: int, count: int, shortest: float = 0.0
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds per step of each worker in each turn, and the cost of each worker.

    The results omit a worker, except the first, that ends before it is ready.

    Args:
      commands: {name: command of a worker}.
      turns: number of timings per worker.
      count: minimum number of steps per turn.
      shortest: minimum duration of the first worker's turns in seconds.

    Raises:
      RuntimeError: the first worker ended before it was ready.
    """
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(contextlib.closing(Worker(command)))
            for name, command in commands.items()
        }
        costs: dict[str, dict[str, float]] = {}
        for name, worker in list(workers.items()):
            try:
                costs[name] = worker.wait()
            except RuntimeError:
                if not costs:
                    raise
                del workers[name]
        if shortest:
            first = next(iter(workers.values())).seconds_per_step(count)
            count *= max(1, math.ceil(shortest / (count * first)))
        times: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(turns):
            for name, worker in workers.items():
                times[name].append(worker.seconds_per_step(count))
    return times, costs


def print_head(*names: str) -> None:
    """Prints the head of a Markdown table."""
    print_row(*names)
    print_row(*["---"] * len(names))


def print_row(*cells: object) -> None:
    """Prints a row of a Markdown table as soon as it is known."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median and the range: "1.02 (0.97-1.10)"."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def milliseconds(seconds: Sequence[float]) -> str:
    """The median in milliseconds, to three digits."""
    median = 1e3 * statistics.median(seconds)
    return f"{median:.3g}" if median < 1000 else f"{median:.0f}"
