"""The experiments (experiments.toml), their runs (runs.csv), and the progress of each run."""

import csv
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

import rezero_jax
from rezero_jax.config import load_config
from rezero_jax.runs.folder import check_config, read_final, saved_steps

HERE = Path(__file__).parent
ROOT = Path(rezero_jax.__file__).parents[1]  # the repository, with train.py and configs/
# The control of every claim that a deep net learns: with every gate frozen at 0 the blocks do
# nothing, so that the net is its first and last layer at any depth.
FROZEN = ("optim.alpha.learning_rate=0.0",)
CONTROL = "alpha frozen at 0"  # its setting
TEST = "test.json"  # in the run folder: the evaluation of the test split


class Job(NamedTuple):
    """A run, as a command of train.py.

    Attributes:
      setting: the paper's name for it; the runs of a setting differ in the seed alone.
      name: of the run's folder.
      config: a file of configs/ and its arguments, such as "mlp.py:residual=plain".
      overrides: texts "a.b=value".
      test: whether to evaluate the test split at the end; for texts only.
    """

    setting: str
    name: str
    config: str
    overrides: tuple[str, ...] = ()
    test: bool = False

    def with_seed(self, seed: int) -> "Job":
        """The same run with another seed, in a folder of its own."""
        overrides = (*self.overrides, f"seed={seed}")
        return self._replace(name=f"{self.name}-{seed}", overrides=overrides)

    def load(self) -> ConfigDict:
        """The config; raises UserError if the file or one of its fields does not exist."""
        return load_config(f"{ROOT / 'configs'}/{self.config}", self.overrides)

    def command(self, workdir: Path) -> list[str]:
        """The command of one process, also in an allocation of several."""
        return [sys.executable, *self._arguments(f"{ROOT}/", workdir), "--num_processes=1"]

    @property
    def shown(self) -> str:
        """The command as a reader types it in the repository."""
        return shlex.join(["python", *self._arguments("", Path("runs", self.name))])

    def _arguments(self, root: str, workdir: Path) -> list[str]:
        return [
            f"{root}train.py",
            f"--config={root}configs/{self.config}",
            *(f"--config.{override}" for override in self.overrides),
            f"--workdir={workdir}",
        ]


class Status(NamedTuple):
    """The progress of a run: "new", "begun", "diverged" or "done", and the updates saved."""

    kind: str
    step: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do; a run that diverged would diverge again."""
        return self.kind in ("done", "diverged")


def status(job: Job, folder: Path) -> Status:
    """The progress of the run in `folder`; raises UserError if it holds a run of another config."""
    check_config(folder, job.load(), advice="choose another --out, or delete that folder")
    final = read_final(folder)
    if not final:
        begun = (folder / "config.json").exists()
        return Status("begun" if begun else "new", max(saved_steps(folder), default=0))
    if final["status"] == "diverged":
        return Status("diverged", final["steps"])
    missing = job.test and not (folder / TEST).exists()
    return Status("begun" if missing else "done", final["steps"])


class Description(NamedTuple):
    """What an experiment is; experiments.toml explains the fields."""

    title: str
    source: str
    seeds: int
    setting: Mapping[str, str]
    notes: Sequence[str]
    full: Sequence[str] = ("paper",)


DESCRIPTIONS = {
    name: Description(**fields)
    for name, fields in tomllib.loads((HERE / "experiments.toml").read_text()).items()
}


def planned(experiment: str, scale: str) -> list[Job]:
    """The runs that an experiment needs at a scale, without their seeds."""
    lines = csv.DictReader((HERE / "runs.csv").read_text().splitlines())
    return [
        Job(line["setting"], line["name"], line["config"], tuple(line["overrides"].split()), test)
        for line in lines
        if (line["experiment"], line["scale"]) == (experiment, scale)
        for test in (bool(line["test"]),)
    ]


def with_seeds(jobs: Sequence[Job], experiment: str, scale: str, count: int | None) -> list[Job]:
    """The runs with seeds 0 .. count - 1, seed by seed, so that an early stop leaves whole seeds.

    By default the count is the paper's at scale "paper", and else 1.
    """
    count = count or (DESCRIPTIONS[experiment].seeds if scale == "paper" else 1)
    return [job.with_seed(seed) for seed in range(count) for job in jobs]
