"""Starts a run of several processes on this machine: `python launch/local.py --help`."""

import argparse
import contextlib
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

TRAIN = Path(__file__).parents[1] / "train.py"
GRACE = 30.0  # seconds
SLOW = (
    "small models train up to a hundred times faster in one process, as after every update the "
    "processes wait for each other; --config.mesh.cpu_devices=N gives one process N devices"
)

DESCRIPTION = f"""\
Starts N processes of train.py on this machine's CPU, which talk to each other as hosts do. Each
gets its share of the cores, and each line it writes begins with its number. Ctrl-C and SIGTERM go
to all of them; if one fails the others are ended, and its exit status is this program's.

It is for trying out a run of several hosts: {SLOW}.
"""
EXAMPLES = """\
example:
    python launch/local.py --processes=2 -- --config=configs/mlp.py --workdir=runs/two
"""


def main(argv: Sequence[str], program: Path = TRAIN, grace: float = GRACE) -> int:
    """Runs the command line and returns the exit status.

    Args:
      argv: options, and after "--" the arguments of the program.
      program: the Python file to start.
      grace: seconds that the other processes have to end in when one has failed.
    """
    parser = argparse.ArgumentParser(
        prog="local.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="of train.py")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes={args.processes} starts nothing; give at least 1")

    if args.processes > 1 and program == TRAIN:
        print(f"local.py: {SLOW}", file=sys.stderr)
    command = [sys.executable, str(program), *args.arguments]
    group = Group()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: group.stop(signum))
    try:
        group.start(command, args.processes)
        return group.wait(grace)
    finally:
        group.end(signal.SIGKILL)


class Group:
    """Processes that live and die together."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._statuses: queue.Queue[int] = queue.Queue()  # in the order in which they end
        self._write = threading.Lock()
        self._stopping: int | None = None

    def start(self, command: Sequence[str], count: int) -> None:
        """Starts the command `count` times, each told who it is and where the first one listens."""
        address = f"localhost:{free_port()}"
        # Several processes cannot share an accelerator.
        environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONUNBUFFERED": "1"}
        for number, cores in enumerate(shares(count)):
            flags = [f"--coordinator={address}", f"--process_id={number}"]
            with on(cores):
                process = subprocess.Popen(
                    [*command, *flags, f"--num_processes={count}"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=environment,
                    process_group=0,  # else a terminal's Ctrl-C would reach it twice
                )
            self._processes.append(process)
            self._thread(lambda process=process: self._statuses.put(process.wait()))
            self._readers += [
                self._thread(self._copy, number, process.stdout, sys.stdout.buffer),
                self._thread(self._copy, number, process.stderr, sys.stderr.buffer),
            ]
        if self._stopping is not None:  # it came while they were being started
            self.end(self._stopping)

    def stop(self, signum: int) -> None:
        """Sends all of them a signal, and leaves it to them when to end."""
        self._stopping = signum
        self.end(signum)

    def end(self, signum: int) -> None:
        """Sends a signal to all that are left."""
        for process in self._processes:
            process.send_signal(signum)

    def wait(self, grace: float) -> int:
        """Waits for all of them, and returns 0 or the status of the first that failed.

        When one fails the others are told to end, unless they know already, and killed `grace`
        seconds later.
        """
        first, left, deadline = 0, len(self._processes), math.inf
        while left:
            try:
                seconds = max(0.0, deadline - time.monotonic())
                status = self._statuses.get(timeout=None if math.isinf(seconds) else seconds)
            except queue.Empty:
                self.end(signal.SIGKILL)
                deadline = math.inf
                continue
            left -= 1
            if status and not first:
                first, deadline = status, time.monotonic() + grace
                if self._stopping is None:
                    self.end(signal.SIGTERM)
        for reader in self._readers:
            reader.join()
        return first if first >= 0 else 128 - first

    def _copy(self, number: int, source: IO[bytes], target: IO[bytes]) -> None:
        for line in source:
            with self._write:
                target.write(b"[%d] %b\n" % (number, line.rstrip(b"\n")))
                target.flush()

    def _thread(self, function: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=function, args=args, daemon=True)
        thread.start()
        return thread


@contextlib.contextmanager
def on(cores: set[int] | None) -> Iterator[None]:
    """What is started within may use these cores only; None: all of ours."""
    if cores is None:
        yield
        return
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)


def shares(count: int) -> list[set[int] | None]:
    """The cores of each process; None where there are too few, or they cannot be chosen."""
    if not hasattr(os, "sched_setaffinity"):  # Linux only
        return [None] * count
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        return [None] * count
    bounds = [len(cores) * i // count for i in range(count + 1)]
    return [set(cores[a:b]) for a, b in pairwise(bounds)]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
