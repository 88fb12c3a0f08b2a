"""Worker processes that time their work on request, so that programs are timed in alternation.

The parent writes a number n to the worker's standard input; the worker runs n steps and prints the
seconds per step. While one worker is timed, the others wait for input. Workers start and compile
concurrently. Those that share a GPU whose memory they exceed run one after another.
"""

import contextlib
import json
import math
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

SHORTEST = 0.3  # minimum seconds per turn; a GPU's queue would distort shorter ones
PROMPT = 16  # bytes that generation continues
TIMING = 45  # seconds that a time limit leaves to the turns, and again to the warm-up before


def serve(steps: Callable[[int], None], cost: Mapping[str, float] | None = None) -> None:
    """Prints `cost`, warms up, prints "ready", and answers each n on stdin with the time per step.

    With a cost, the first line on stdin starts the warm-up.
    """
    print(json.dumps(cost or {}), flush=True)
    if cost:
        sys.stdin.readline()
    steps(3)
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        started = time.perf_counter()
        steps(count)
        print((time.perf_counter() - started) / count, flush=True)


class Worker:
    """A running worker.

    Each `until` is a time of `time.monotonic`. Methods that take it raise a RuntimeError if the
    worker has ended, or has not answered by then.

    Args:
      command: starts a process that calls `serve`.
    """

    def __init__(self, command: Sequence[str]):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            bufsize=0,
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ,  # JAX takes 3/4 of a GPU
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._command, self._in, self._out = command, self._process.stdin, self._process.stdout

    def cost(self, until: float = math.inf) -> dict[str, float]:
        """Waits until the worker has compiled, and returns its `cost`."""
        return json.loads(self._read("{", until))

    def warm_up(self) -> None:
        """Starts the warm-up; does not wait for its end."""
        self._write("")

    def wait(self, until: float = math.inf) -> None:
        """Waits until the worker has warmed up."""
        self._read("ready", until)

    def seconds_per_step(self, count: int, until: float = math.inf) -> float:
        """Seconds per step of `count` steps."""
        self._write(str(count))
        return float(self._read("", until))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def _write(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `_read` finds
            self._in.write(f"{line}\n".encode())

    def _read(self, start: str, until: float) -> str:
        """The next line of the output that begins with `start`."""
        while True:
            left = None if until == math.inf else max(0.0, until - time.monotonic())
            if not select.select([self._out], [], [], left)[0]:
                raise RuntimeError(f"{' '.join(self._command)} exceeded the time limit")
            line = self._out.readline().decode()
            if not line:
                raise RuntimeError(f"{' '.join(self._command)} ended, see its error")
            if line.startswith(start):
                return line


def take_turns(
    commands: dict[str, list[str]],
    turns: int,
    count: int,
    shortest: float = 0.0,
    until: float = math.inf,
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds per step of each worker in each turn, and the cost of each worker.

    If the "memory" of all workers exceeds the "limit" of the first, each is timed alone. The
    results omit a worker, except the first, that ends before its last turn.

    Args:
      commands: {name: command of a worker}.
      turns: number of timings per worker.
      count: minimum number of steps per turn.
      shortest: minimum duration of the first worker's turns in seconds.
      until: time of `time.monotonic` at which the last turn is over; a worker that has not compiled
        2 TIMING seconds before, or is not ready TIMING seconds before, counts as ended.

    Raises:
      RuntimeError: the first worker ended before its last turn, or was too late.
    """
    first, ready = next(iter(commands)), until - TIMING
    costs: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(contextlib.closing(Worker(command)))
            for name, command in commands.items()
        }

        def ask(names: Sequence[str], question: Callable[[str], None]) -> list[str]:
            """The names of the workers that answer."""
            answered = []
            for name in names:
                try:
                    question(name)
                    answered.append(name)
                except RuntimeError:
                    if name == first:
                        raise
            return answered

        def cost(name: str) -> None:
            costs[name] = workers[name].cost(ready - TIMING)

        def turn(name: str) -> None:
            times.setdefault(name, []).append(workers[name].seconds_per_step(count, until))

        compiled = ask([*commands], cost)
        memory = sum(costs[name].get("memory", 0) for name in compiled)
        fits = memory <= costs[first].get("limit", math.inf)
        for group in [compiled] if fits else [[name] for name in compiled]:
            for name in filter(costs.get, group):
                workers[name].warm_up()
            group = ask(group, lambda name: workers[name].wait(ready))
            if shortest and first in group:
                seconds = workers[first].seconds_per_step(count, until)
                count *= max(1, math.ceil(shortest / (count * seconds)))
            for _ in range(turns):
                group = ask(group, turn)
            for name in group:
                workers[name].close()
    times = {name: seconds for name, seconds in times.items() if len(seconds) == turns}
    return times, {name: costs[name] for name in times}


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
