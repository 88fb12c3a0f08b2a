"""The interface of the experiments."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from matplotlib.figure import Figure

from experiments.jobs import Job
from experiments.results import Results
from rezero_jax.runs.reader import Run


class Experiment(Protocol):
    """A module that lists its runs, measures them and plots the results."""

    @property
    def TITLE(self) -> str:
        """What it is."""

    @property
    def SOURCE(self) -> str:
        """Where it is in the paper."""

    @property
    def SEEDS(self) -> int:
        """Runs of each setting in the paper."""

    @property
    def SETTING(self) -> Mapping[str, str]:
        """By scale, what is run, in a sentence or two."""

    @property
    def NOTES(self) -> Sequence[str]:
        """Paragraphs on how to read the numbers."""

    def runs(self, scale: str) -> list[Job]:
        """The runs it needs, without their seeds."""

    def measure(self, scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
        """The results, from the runs of each setting."""

    def plot(self, results: Results) -> Figure:
        """The plot of them."""
