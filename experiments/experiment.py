"""The experiments: their descriptions, from experiments.toml, and their interface."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from matplotlib.figure import Figure

from experiments.jobs import Job
from experiments.results import Results
from rezero_jax.runs.reader import Run


class Description(NamedTuple):
    """What an experiment is.

    Attributes:
      title: of its section and plot.
      source: where the experiment is in the paper.
      seeds: runs of each setting in the paper.
      setting: by scale, what runs, in a sentence or two.
      notes: paragraphs on how to read the numbers.
    """

    title: str
    source: str
    seeds: int
    setting: Mapping[str, str]
    notes: Sequence[str]


_TEXT = Path(__file__).with_name("experiments.toml").read_text()
DESCRIPTIONS = {name: Description(**fields) for name, fields in tomllib.loads(_TEXT).items()}


class Experiment(Protocol):
    """A module that lists its runs, measures them and plots the results."""

    def runs(self, scale: str) -> list[Job]:
        """The runs that the experiment needs, without their seeds."""

    def measure(self, scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
        """The results, from the runs of each setting."""

    def plot(self, results: Results) -> Figure:
        """The plot of the results."""
