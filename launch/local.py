"""Starts a run of several processes on this machine: `python launch/local.py --help`."""

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds only its own folder

from launch.supervisor import Supervisor, core_shares, start
from rezero_jax import command

TRAIN = Path(__file__).parents[1] / "train.py"
GRACE = 30.0  # seconds
SLOW = (
    "small models train up to a hundred times faster in one process, because processes wait for "
    "each other after every update; --config.mesh.cpu_devices=N gives one process N devices"
)

DESCRIPTION = f"""\
Start N processes of train.py on this machine's CPU, which communicate as hosts do. The processes
share the cores, and each line of output begins with the number of its process. Ctrl-C and SIGTERM
reach all processes. If one fails, the others are stopped and this program exits with its status.

{textwrap.fill(f"Use this program only to try out a run of several hosts: {SLOW}.", 100)}
"""
EXAMPLES = """\
example:
    python launch/local.py --processes=2 -- --config=configs/mlp.py --workdir=runs/two
"""


def main(argv: Sequence[str], program: Path = TRAIN, grace: float = GRACE) -> int:
    """Runs the command line and returns the exit status.

    Args:
      argv: options, then "--" and the arguments of the program.
      program: the Python file to start.
      grace: seconds after a failure within which the other processes must end.
    """
    parser = argparse.ArgumentParser(
        prog="local.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--processes", type=int, required=True, metavar="N", help="number of processes"
    )
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="arguments of train.py")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes={args.processes} starts nothing; give at least 1")

    if args.processes > 1 and program == TRAIN:
        print(f"local.py: {SLOW}", file=sys.stderr)
    words = [sys.executable, str(program), *args.arguments]
    with Supervisor() as supervisor:
        return _run(words, args.processes, grace, supervisor)


def _run(command: Sequence[str], count: int, grace: float, supervisor: Supervisor) -> int:
    """Runs `count` processes of the command; returns 0 or the status of the first failure."""
    address = f"localhost:{free_port()}"
    # Several processes cannot share an accelerator.
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONUNBUFFERED": "1"}
    running, copiers, lock = [], [], threading.Lock()
    for number, cores in enumerate(core_shares(count)):
        flags = [f"--coordinator={address}", f"--process_id={number}", f"--num_processes={count}"]
        process = start(
            [*command, *flags],
            cores,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        running.append(supervisor.add(process))
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            copy = (number, source, target.buffer, lock)
            copiers.append(threading.Thread(target=_copy, args=copy, daemon=True))
            copiers[-1].start()
    first, deadline = 0, math.inf
    while running:
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            if process.returncode and not first:
                first, deadline = process.returncode, time.monotonic() + grace
                if supervisor.signum is None:
                    supervisor.send(signal.SIGTERM)
        if time.monotonic() > deadline:
            supervisor.send(signal.SIGKILL)
        time.sleep(0.02)
    for copier in copiers:
        copier.join()
    return first if first >= 0 else 128 - first


def _copy(number: int, source: IO[bytes], target: IO[bytes], lock: threading.Lock) -> None:
    for line in source:
        with lock:
            target.write(b"[%d] %b\n" % (number, line.rstrip(b"\n")))
            target.flush()


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    command.open_streams(lasting=True)
    sys.exit(main(sys.argv[1:]))
