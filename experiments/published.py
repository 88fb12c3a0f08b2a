"""The paper's claims, its own numbers (published.csv) and their sources (sources.toml)."""

import csv
import tomllib
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from experiments.jobs import HERE
from experiments.statistics import NOT_SIGNIFICANT, Draw, Interval
from rezero_jax.formatting import number

_SOURCES = tomllib.loads((HERE / "sources.toml").read_text())
SOURCES = {mark: source["text"] for mark, source in _SOURCES.items()}
MARKS = {mark: source["word"] for mark, source in _SOURCES.items() if "word" in source}
STATUSES = (
    "replicated",
    "compatible",
    "not supported",
    "significant",
    "not significant",
    "not tested",
)
WORDS = {True: "supported", False: "contradicted", None: NOT_SIGNIFICANT}
INFORMATIVE = 2.5  # times: a prediction interval with ends further apart hardly tests a claim


class Published(NamedTuple):
    """A number of the paper."""

    value: float | None  # None where the paper has a word, such as "diverged"
    text: str  # as written in published.csv
    error: float | None  # the standard error; half of a bin for a number read off a histogram
    source: str  # a key of SOURCES and a place, after "derived" perhaps a second one

    @property
    def shown(self) -> str:
        """The number as "31 ± 1 (notebook)", or the word; unmarked if the paper prints it."""
        error = f" ± {number(self.error, 2)}" if self.error is not None else ""
        text = self.text if self.value is None else number(self.value) + error
        marks = ", ".join(MARKS[word] for word in self.source.split() if word in MARKS)
        return f"{text} ({marks})" if marks else text


@cache
def published(experiment: str) -> dict[tuple[str, str], Published]:
    """(setting, metric) -> number, of one experiment, in the paper's order."""
    text = (HERE / "published.csv").read_text()
    return {
        (row["setting"], row["quantity"]): Published(
            _float(row["value"]), row["value"], _float(row["error"]), row["source"]
        )
        for row in csv.DictReader(text.splitlines())
        if row["experiment"] == experiment
    }


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def curve(experiment: str, setting: str, prefix: str) -> list[tuple[float, float]]:
    """The values of a setting whose metric is `prefix` followed by a number x, as (x, value)."""
    points = []
    for (of, metric), paper in published(experiment).items():
        if of == setting and metric.startswith(prefix) and paper.value is not None:
            points.append((float(metric.removeprefix(prefix).split()[0]), paper.value))
    return sorted(points)


class Claim(NamedTuple):
    """A sentence of the paper, or one of ours, and the evidence for it."""

    text: str
    source: str  # empty if the claim is ours
    holds: bool | None  # what our runs say; None if that is not significant
    evidence: str
    n: int = 1  # the runs, pairs of runs or networks behind the claim
    interval: Interval | None = None  # of the quantity in `evidence`; None if single or exact
    reduced: bool = False  # our setting is smaller than the paper's, so tests nothing about it
    weak: bool = False  # the claim could hardly have failed

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> "Claim":
        ends = fields["interval"]
        return cls(**fields | {"interval": (ends[0], ends[1]) if ends else None})

    @property
    def status(self) -> str:
        """One of STATUSES.

        "replicated": in the paper's setting, the claim could have failed and did not; "compatible":
        it could hardly have failed; "not supported": it failed, or the evidence is not significant;
        "not tested": our setting is smaller. A claim of ours is "significant" or "not significant".
        """
        if not self.source:
            return "significant" if self.holds else "not significant"
        if self.reduced:
            return "not tested"
        if not self.holds:
            return "not supported"
        return "compatible" if self.weak else "replicated"


def lies_in(interval: Interval, paper: Published) -> bool:
    """Whether an interval holds a number that rounds to the printed one."""
    if paper.value is None:
        return False
    half = 0.5 * 10 ** -len(paper.text.partition(".")[2])
    return interval[0] <= paper.value + half and paper.value - half <= interval[1]


def quoted(values: Iterable[Draw]) -> str:
    """The numbers, separated by commas."""
    return ", ".join("none" if value is None else number(value) for value in values)
