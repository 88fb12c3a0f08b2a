"""The results of an experiment: its numbers beside the paper's, and the evidence for each claim."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.published import Published, published, with_error
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.formatting import number
from rezero_jax.runs.files import write_json

COLUMNS = (  # of the CSV files
    *("experiment", "scale", "setting", "quantity", "ours", "ours_standard_error", "runs"),
    *("runs_with_the_number", "reduced", "paper_setting", "paper", "paper_standard_error"),
    *("source", "difference"),
)


class Row(NamedTuple):
    """A number, or one that was never reached.

    Attributes:
      setting, quantity: as in published.csv, where the paper has it.
      ours: of each run; None where there is none.
      headline: whether it stands in the summary.
      reduced: whether ours is from a smaller experiment than the paper's.
      against: the paper's setting to compare with, where it is not `setting`.
      missing: what None means.
    """

    setting: str
    quantity: str
    ours: tuple[float | None, ...]
    headline: bool = False
    reduced: bool = False
    against: str = ""
    missing: str = "not reached"

    @property
    def estimate(self) -> Estimate | None:
        """The mean over the runs and its standard error; None unless all have the number."""
        return Estimate.of_all(self.ours)

    @property
    def mean(self) -> float | None:
        """Over the runs; None unless all have the number."""
        return self.estimate.mean if self.estimate else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None of a single run."""
        estimate = self.estimate
        return estimate.standard_error if estimate and estimate.count > 1 else None

    @property
    def shown(self) -> str:
        """The mean as "31 ± 1", or `missing`."""
        return self.missing if self.mean is None else with_error(self.mean, self.error)


class Claim(NamedTuple):
    """A sentence of the paper, and whether our runs confirm it.

    Attributes:
      holds: None if the runs do not decide it; `evidence` gives the reason.
    """

    text: str
    source: str
    holds: bool | None
    evidence: str


class Curve(NamedTuple):
    """A curve to plot: x (n,), y (n,) or (n, layers), and the deviation over the runs (n,)."""

    x: list[float]
    y: list[Any]
    spread: list[float] | None = None

    @classmethod
    def of_runs(cls, curves: Sequence[tuple[Iterable[float], Iterable[float]]]) -> "Curve":
        """The mean of several (x, y), as far as all of them go, and their standard deviation."""
        listed = [(list(map(float, x)), list(map(float, y))) for x, y in curves]
        length = min(len(x) for x, _ in listed)
        values = np.array([y[:length] for _, y in listed])
        spread = values.std(0, ddof=1).tolist() if len(listed) > 1 else None
        return cls(listed[0][0][:length], values.mean(0).tolist(), spread)


class Made(NamedTuple):
    """How results were made.

    Attributes:
      command: of `experiments`.
      device: that the runs used.
      seconds: of all runs, one after another, and of the computations on them.
      runs: the commands of the runs.
    """

    command: str
    device: str
    seconds: float
    runs: list[str]


@dataclasses.dataclass(frozen=True)
class Results:
    """All that an experiment found at a scale."""

    experiment: str
    scale: str
    rows: list[Row]
    claims: list[Claim] = dataclasses.field(default_factory=list)
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
    made: Made | None = None

    def paper(self, row: Row) -> Published | None:
        """The paper's number for a row, if it has one."""
        return published(self.experiment).get((row.against or row.setting, row.quantity))

    def difference(self, row: Row) -> float | None:
        """Ours less the paper's."""
        paper = self.paper(row)
        if row.mean is None or paper is None or paper.value is None:
            return None
        return row.mean - paper.value

    def write(self, folder: Path) -> None:
        """Writes NAME.json with everything and NAME.csv with the rows."""
        write_json(folder / f"{self.experiment}.json", finite(dataclasses.asdict(self)))
        (folder / f"{self.experiment}.csv").write_text(self.csv())

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What `write` wrote to NAME.json."""
        content = json.loads(path.read_text())
        return cls(
            content["experiment"],
            content["scale"],
            [Row(*row)._replace(ours=tuple(row[2])) for row in content["rows"]],
            [Claim(*claim) for claim in content["claims"]],
            {name: Curve(*curve) for name, curve in content["curves"].items()},
            Made(*made) if (made := content.get("made")) else None,
        )

    def csv(self) -> str:
        """The rows as CSV; unknown values are empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            paper = self.paper(row)
            numbers = (row.mean, row.error, len(row.ours), len(row.ours) - row.ours.count(None))
            theirs: tuple[str | float | None, ...] = (None,) * 4
            if paper:
                theirs = (row.against or row.setting, paper.text, paper.error, paper.source)
            head = (self.experiment, self.scale, row.setting, row.quantity)
            writer.writerow((*head, *numbers, row.reduced, *theirs, self.difference(row)))
        return out.getvalue()


def find(rows: Iterable[Row], setting: str, quantity: str) -> Row:
    """The row of a setting and a quantity."""
    return next(row for row in rows if (row.setting, row.quantity) == (setting, quantity))


def lower(one: Row, other: Row) -> bool | None:
    """Whether one mean is lower than the other; None within two standard errors, or of one run."""
    if None in (one.mean, other.mean, one.error, other.error):
        return None
    difference = one.mean - other.mean  # type: ignore[operator]
    error = math.hypot(one.error, other.error)  # type: ignore[arg-type]
    return difference < 0 if abs(difference) > 2 * error else None


def finite(tree: Any) -> Any:
    """The tree with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def span(values: Sequence[float]) -> str:
    """The smallest and the largest."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def quoted(values: Iterable[float | None]) -> str:
    """The numbers, separated by commas."""
    return ", ".join("none" if value is None else number(value) for value in values)
