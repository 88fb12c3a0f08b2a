"""Runs jobs, several at once, each in a process of its own. A stopped command saves them.

A process fixes its number of CPU devices once, and a run that dies must not take others with it.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.jobs import ROOT, TEST, Job, status
from launch import supervisor
from launch.supervisor import Supervisor
from rezero_jax.errors import UserError
from rezero_jax.formatting import duration
from rezero_jax.runs.files import write_json

DIVERGED = 3  # train.py's exit status
SILENCE = 30.0  # seconds between two reports on the running jobs


class Stopped(Exception):
    """SIGINT or SIGTERM (`signum`) stopped the runs, which have saved their state."""

    def __init__(self, signum: int):
        super().__init__("stopped, all runs saved; the same command resumes them")
        self.signum = signum


def run_all(jobs: Sequence[Job], folder: Path, slots: int) -> Iterator[tuple[Job, str | None]]:
    """Runs each job in folder/NAME, `slots` at once, each on its own cores of a CPU.

    The output of a run goes to NAME.log beside its folder. Yields each job as it ends, with None or
    a sentence on why it failed; raises Stopped on SIGINT or SIGTERM.
    """
    if not (ROOT / "train.py").is_file():
        raise UserError(f"{ROOT} has no train.py; run this command in a checkout of the project")
    folder.mkdir(parents=True, exist_ok=True)
    waiting = []
    for job in jobs:
        if status(job, folder / job.name).is_over:
            yield job, None
        else:
            waiting.append(job)
    free, running = supervisor.core_shares(slots), list[_Process]()
    total, began = len(waiting), time.monotonic()
    spoke = began
    with Supervisor() as supervised:
        while running or (waiting and not supervised.signum):
            while waiting and free and not supervised.signum:
                running.append(_Process(waiting.pop(0), folder, free.pop(0), supervised))
                print(f"{running[-1].job.name}: started", flush=True)
            for process in [process for process in running if process.has_ended()]:
                running.remove(process)
                free.append(process.cores)
                ended = total - len(waiting) - len(running)
                left = duration((time.monotonic() - began) / ended * (total - ended))
                outcome = process.sentence or process.outcome
                print(f"[{ended}/{total}] {process.job.name}: {outcome}, {left} left", flush=True)
                if not supervised.signum:
                    yield process.job, process.sentence
            if time.monotonic() - spoke > SILENCE:
                spoke = time.monotonic()
                for process in running:
                    print(f"{process.job.name}: {process.last_line()}", flush=True)
            time.sleep(0.1)
    if supervised.signum:
        raise Stopped(supervised.signum)


class _Process:
    """A running job: its training, then its evaluation, if any."""

    def __init__(self, job: Job, folder: Path, cores: frozenset[int], supervised: Supervisor):
        self.job, self.cores, self._supervised = job, cores, supervised
        self.sentence: str | None = None
        self.outcome = "done"
        self._workdir, self._log = folder / job.name, folder / f"{job.name}.log"
        self._log.write_bytes(b"")
        self._evaluating = False
        self._process = supervised.add(start(job.command(self._workdir), cores, self._log))

    def has_ended(self) -> bool:
        """Whether the job is over; starts a remaining evaluation unless a signal came."""
        status = self._process.poll()
        if status is None:
            return False
        if status == DIVERGED:
            self.outcome = self.last_line()
        elif status:
            self.sentence = self.last_line()
        elif self._evaluating:
            write_json(self._workdir / TEST, json.loads(self.last_line()))
        elif self.job.test and not self._supervised.signum:
            self._evaluating = True
            flags = ["--mode=eval", "--config.data.eval_split=test"]
            command = [*self.job.command(self._workdir), *flags]
            self._process = self._supervised.add(start(command, self.cores, self._log))
            return False
        return True

    def last_line(self) -> str:
        """The newest line that the process printed."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("train.py: ") if lines else "starting"


def start(command: Sequence[str], cores: frozenset[int], log: Path) -> subprocess.Popen[bytes]:
    """Starts a process on these cores that appends its output to a file and may share a GPU."""
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    with log.open("ab") as file:
        return supervisor.start(command, cores, stdout=file, stderr=subprocess.STDOUT, env=env)
