"""The runs that the campaign kills and damages: one small network of each family, by train.py."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from etils import epath

from tests.faults.compare import Judge

ROOT = Path(__file__).parents[2]
PATIENCE = 900.0  # seconds after which a process that does not end is said to hang
UNAVAILABLE = (4, -signal.SIGABRT, 128 + signal.SIGABRT)  # the same command resumes

COMMON = {
    "train.epochs": None,
    "train.steps_per_dispatch": 7,  # divides no interval
    "checkpoint.keep": 4,
    "checkpoint.keep_best": 1,
    "log.every_steps": 10,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of network, and a run of it that takes some seconds longer than its start."""

    name: str  # in the tables
    config: str  # the config file
    steps: int  # length of the run
    save_every: int  # steps between two checkpoints
    fields: dict[str, object]  # fields of the config, in addition to these and COMMON
    storage: str = ""  # prefix of the path of a workdir: "", or a bucket such as "gs://runs"
    # variables by which processes reach the storage.
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    processes: int = 1  # number of processes of the run

    @property
    def settings(self) -> list[str]:
        """The config's fields as "key=value"."""
        length = {"train.steps": self.steps, "checkpoint.every_steps": self.save_every}
        return [f"{key}={value}" for key, value in (COMMON | length | self.fields).items()]

    def of_processes(self, count: int) -> Self:
        """The run by several processes, which wait for each other in each of its fewer steps."""
        if count == 1:
            return self
        fields = self.fields | {"train.batch_size": 64, "mesh.cpu_devices": 1}
        if "eval.every_steps" in fields:
            fields["eval.every_steps"] = self.save_every // 10
        return dataclasses.replace(
            self,
            steps=self.steps // 10,
            save_every=self.save_every // 10,
            fields=fields,
            processes=count,
        )

    def folder(self, local: Path) -> epath.Path:
        """The folder in the storage that belongs to a folder on the disk."""
        return epath.Path(f"{self.storage}{local}")

    def command(self, workdir: epath.Path) -> list[str]:
        """The command line of the run."""
        overrides = [f"--config.{text}" for text in self.settings]
        arguments = [f"--config={ROOT / self.config}", f"--workdir={workdir}", *overrides]
        if self.processes == 1:
            return [sys.executable, str(ROOT / "train.py"), *arguments]
        launch = [sys.executable, str(ROOT / "launch/local.py")]
        return [*launch, f"--processes={self.processes}", "--", *arguments]


FAMILIES = [
    # The learning rate is too high, so that the best checkpoint is an early one.
    Family(
        "mlp",
        "configs/mlp.py:smoke",
        6000,
        200,
        {"eval.every_epochs": None, "eval.every_steps": 200, "optim.learning_rate": 0.1},
    ),
    Family("resnet", "configs/resnet.py:smoke", 800, 50, {"eval.every_epochs": 5.0}),
    Family(
        "transformer",
        "configs/transformer_small.py:smoke",
        1500,
        100,
        {"eval.every_steps": 100, "eval.examples": 512},
    ),
]


class Process:
    """A process with the command of a run, and the processes that it starts."""

    def __init__(self, family: Family, workdir: epath.Path, log: Path, cache: epath.Path):
        self._log, self._count = log, family.processes
        self.started = time.monotonic()
        own = {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
        env = os.environ | family.environment | own
        with log.open("w") as file:
            self.popen = subprocess.Popen(
                family.command(workdir), stdout=file, stderr=subprocess.STDOUT, env=env
            )

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def wait(self) -> int:
        """The exit status, once the process has ended by itself; a process that hangs is killed."""
        try:
            return self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            for pid in self._pids():
                os.kill(pid, signal.SIGKILL)
            self.popen.wait()
            raise TimeoutError(f"{self._log} has not ended in {PATIENCE:.0f} s") from None

    def kill(self, which: int = 0) -> int:
        """Kills one of the processes by kill -9.

        Returns:
          The exit status, which is another one if the process had ended before.
        """
        while self.is_running:
            if len(pids := self._pids()) == self._count:
                os.kill(pids[which], signal.SIGKILL)
                break
            time.sleep(0.01)  # until all have started
        status = self.wait()  # the others end when they notice
        return -signal.SIGKILL if status == 128 + signal.SIGKILL else status

    def _pids(self) -> list[int]:
        """Processes that run, or have ended and are waited for."""
        if self._count == 1:
            return [self.popen.pid]
        children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    @property
    def said(self) -> "Said":
        return Said(self._log.read_text(errors="replace"))


@dataclasses.dataclass(frozen=True)
class Said:
    """The output of a process."""

    text: str

    @property
    def resumed_at(self) -> int | None:
        """The step from which the process resumed; None if it did not get that far."""
        if found := re.search(r"resuming after step ([\d,]+)", self.text):
            return int(found[1].replace(",", ""))
        return 0 if " steps of " in self.text else None

    @property
    def has_trained(self) -> bool:
        """Whether the process had compiled and made its first updates."""
        return re.search(r"first \d+ step\(s\) with compilation", self.text) is not None

    @property
    def damaged(self) -> list[int]:
        """Steps of the checkpoints that the process called damaged."""
        return [
            int(step) for step in re.findall(r"warning: checkpoint (\d+) is damaged", self.text)
        ]


@dataclasses.dataclass(frozen=True)
class Reference:
    """The run that nothing stopped."""

    family: Family
    workdir: epath.Path
    seconds: float  # seconds of the whole process, when everything is compiled
    training: float  # seconds of these after the first updates

    def seconds_from(self, step: int) -> tuple[float, float]:
        """Expected seconds of a process that resumes after `step`: in all, and of training."""
        training = self.training * (1 - step / self.family.steps)
        return self.seconds - self.training + training, training


@dataclasses.dataclass(frozen=True)
class Task:
    """A run to kill or to damage."""

    reference: Reference  # the same run, which nothing stopped
    home: Path  # local folder for workdirs and output; removed if there are no problems
    cache: epath.Path  # folder of what JAX compiled
    rng: random.Random  # draws moments and damages
    judge: Judge  # compares runs

    def start(self, workdir: epath.Path, log: Path) -> Process:
        """A process that trains in `workdir`."""
        return Process(self.reference.family, workdir, log, self.cache)

    def differences(self, workdir: epath.Path) -> list[str]:
        """Differences between the finished run in `workdir` and the reference."""
        return self.judge.differences(workdir, self.reference.workdir)
