"""Runs jobs, several at once. A stopped command saves them, and the next call resumes them.

Each job is a process of its own: a process fixes its number of CPU devices once, jobs share a
machine without sharing an interpreter, and a run that dies takes nothing with it.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from experiments.jobs import ROOT, TEST, Job, status
from launch.local import on
from rezero_jax.errors import UserError
from rezero_jax.runs.files import write_json

DIVERGED = 3  # train.py's exit status
SILENCE = 30.0  # seconds between two reports on the running jobs


class Stopped(Exception):
    """SIGINT or SIGTERM (`signum`) stopped the runs, which have saved their state."""

    def __init__(self, signum: int):
        super().__init__("stopped, all runs saved; the same command resumes them")
        self.signum = signum


def execute(
    jobs: Sequence[Job], folder: Path, slots: int, say: Callable[[str], None]
) -> Iterator[tuple[Job, str | None]]:
    """Runs each job in folder/NAME, `slots` at once, each on its own cores of a CPU.

    The output of a run goes to NAME.log beside its folder.

    Args:
      say: called with each line to report.

    Yields:
      Each job as it ends, with None or a sentence that says why it failed.

    Raises:
      UserError: a run folder holds another run, or there is no train.py in this checkout.
      Stopped: on SIGINT or SIGTERM.
    """
    if not (ROOT / "train.py").is_file():
        raise UserError(f"there is no train.py in {ROOT}; run this in a checkout of the project")
    folder.mkdir(parents=True, exist_ok=True)
    waiting = []
    for job in jobs:
        if status(job, folder / job.name).is_over:
            yield job, None
        else:
            waiting.append(job)
    free, running, told = _core_groups(slots), list[_Process](), 0
    spoke = time.monotonic()
    with _signals() as received:
        try:
            while running or (waiting and not received):
                while waiting and free and not received:
                    running.append(_Process(waiting.pop(0), folder, free.pop(0)))
                    say(f"{running[-1].job.name}: started")
                ended = [process for process in running if process.has_ended(bool(received))]
                for process in ended:
                    running.remove(process)
                    free.append(process.cores)
                    say(f"{process.job.name}: {process.sentence or process.outcome}")
                    if not received:
                        yield process.job, process.sentence
                        lost = [job for job in waiting if process.lacks_the_data_of(job)]
                        waiting = [job for job in waiting if job not in lost]
                        yield from ((job, process.sentence) for job in lost)
                if len(received) > told:
                    told = len(received)
                    for process in running:
                        process.stop()
                if time.monotonic() - spoke > SILENCE:
                    spoke = time.monotonic()
                    for process in running:
                        say(f"{process.job.name}: {process.last_line()}")
                time.sleep(0.1)
        finally:
            for process in running:  # the caller gave up
                process.stop()
    if received:
        raise Stopped(received[0])


class _Process:
    """A running job: its training, then its evaluation if it has one."""

    def __init__(self, job: Job, folder: Path, cores: set[int] | None):
        self.job, self.cores = job, cores
        self.sentence: str | None = None
        self.outcome = "done"
        self._workdir, self._log = folder / job.name, folder / f"{job.name}.log"
        self._log.write_bytes(b"")
        self._evaluating = False
        self._process = start(job.command(self._workdir), cores, self._log)

    def has_ended(self, stopping: bool) -> bool:
        """Whether it is over; starts the evaluation if one is due, unless stopping."""
        status = self._process.poll()
        if status is None:
            return False
        if status == DIVERGED:
            self.outcome = self.last_line()
        elif status:
            self.sentence = self.last_line()
        elif self._evaluating:
            write_json(self._workdir / TEST, json.loads(self.last_line()))
        elif self.job.test and not stopping:
            self._evaluating = True
            flags = ["--mode=eval", "--config.data.eval_split=test"]
            command = [*self.job.command(self._workdir), *flags]
            self._process = start(command, self.cores, self._log)
            return False
        return True

    def lacks_the_data_of(self, job: Job) -> bool:
        """Whether it failed because a data set is missing that `job` needs as well."""
        return f'data set "{job.load().data.name}"' in (self.sentence or "")

    def stop(self) -> None:
        """Tells it to save its state and end; the second time, to end at once."""
        self._process.send_signal(signal.SIGTERM)

    def last_line(self) -> str:
        """The newest line that it printed."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("train.py: ") if lines else "starting"


def start(command: Sequence[str], cores: set[int] | None, log: Path) -> subprocess.Popen[bytes]:
    """A process on these cores that adds its output to a file.

    It has a process group of its own: a Ctrl-C at the terminal reaches only us, and we tell it.
    """
    with on(cores), log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)


def _core_groups(count: int) -> list[set[int] | None]:
    """The cores of each of `count` runs at once; None where cores cannot be chosen."""
    if not hasattr(os, "sched_getaffinity"):  # Linux only
        return [None] * count
    cores = sorted(os.sched_getaffinity(0))
    size = max(len(cores) // count, 1)
    starts = [index * size % len(cores) for index in range(count)]
    return [set(cores[start : start + size]) for start in starts]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM are added as they come."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    old = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
