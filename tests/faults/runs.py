"""The runs that the campaign kills and damages: one small network of each family, by train.py."""

import dataclasses
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from etils import epath

from tests.faults.compare import differences

ROOT = Path(__file__).parents[2]
PATIENCE = 900.0  # seconds after which a process that does not end is said to hang
UNAVAILABLE = 4  # exit status after an outage; the same command resumes

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

    def folder(self, local: Path) -> epath.Path:
        """The folder in the storage that belongs to a folder on the disk."""
        return epath.Path(f"{self.storage}{local}")

    def command(self, workdir: epath.Path) -> list[str]:
        """The command line of the run."""
        length = {"train.steps": self.steps, "checkpoint.every_steps": self.save_every}
        fields = COMMON | length | self.fields
        overrides = [f"--config.{key}={value}" for key, value in fields.items()]
        paths = [f"--config={ROOT / self.config}", f"--workdir={workdir}"]
        return [sys.executable, str(ROOT / "train.py"), *paths, *overrides]


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
    """A process with the command of a run."""

    def __init__(self, family: Family, workdir: epath.Path, log: Path, cache: epath.Path):
        self._log = log
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
            self.kill()
            raise TimeoutError(f"{self._log} has not ended in {PATIENCE:.0f} s") from None

    def kill(self) -> int:
        """Kills it by kill -9; the exit status is another one if it had ended before."""
        self.popen.kill()
        return self.popen.wait()

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
        found = re.findall(r"warning: checkpoint (\d+) is damaged", self.text)
        return list(map(int, found))


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

    def start(self, workdir: epath.Path, log: Path) -> Process:
        """A process that trains in `workdir`."""
        return Process(self.reference.family, workdir, log, self.cache)

    def differences(self, workdir: epath.Path) -> list[str]:
        """Differences between the finished run in `workdir` and the reference."""
        return differences(workdir, self.reference.workdir)
