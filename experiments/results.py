"""The results of an experiment: its numbers beside the paper's, and the evidence for each claim."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.claims import LEVEL, Claim
from experiments.published import Published, published
from experiments.ratios import between
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.formatting import number
from rezero_jax.runs.files import write_json

COLUMNS = (  # of the CSV files; the ends are those of 95 % intervals
    *("experiment", "scale", "setting", "quantity", "ours", "ours_low", "ours_high", "runs"),
    *("runs_with_the_number", "reduced", "paper", "paper_standard_error", "source"),
)


class Row(NamedTuple):
    """A number, or one that was never reached.

    Attributes:
      setting, quantity: as in published.csv, where the paper has it.
      ours: of each run; None where there is none.
      headline: whether it stands in the summary.
      reduced: whether ours is from a smaller experiment than the paper's, beside which no number
        of the paper stands.
      missing: what None means.
      is_geometric: whether its mean is geometric and its interval that of the logarithms.
    """

    setting: str
    quantity: str
    ours: tuple[float | None, ...]
    headline: bool = False
    reduced: bool = False
    missing: str = "not reached"
    is_geometric: bool = False

    @property
    def mean(self) -> float | None:
        """Over the runs; None unless all have the number."""
        estimate = self._estimate
        return None if estimate is None else self._back(estimate.mean)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the mean; None of a single run, or where one has none."""
        return self._ends(Estimate.interval, LEVEL)

    def prediction(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Student's interval for one more run, of confidence 1 - level; None as `interval` is."""
        return self._ends(Estimate.prediction, level)

    @property
    def shown(self) -> str:
        """The mean and its interval as "31 (28 to 34)", or `missing` and in how many runs."""
        if self.mean is None:
            count = self.ours.count(None)
            some = f" in {count} of {len(self.ours)}" if count < len(self.ours) else ""
            return self.missing + some
        return number(self.mean) + (f" ({between(self.interval)})" if self.interval else "")

    @property
    def _estimate(self) -> Estimate | None:
        if not self.is_geometric:
            return Estimate.of_all(self.ours)
        return Estimate.of_all([None if x is None else math.log(x) for x in self.ours])

    def _ends(
        self, of: Callable[[Estimate, float], tuple[float, float]], level: float
    ) -> tuple[float, float] | None:
        """The interval `of` the runs, of confidence 1 - level; None where there is none."""
        estimate = self._estimate
        if estimate is None or estimate.count < 2:
            return None
        low, high = of(estimate, 1 - level)
        return self._back(low), self._back(high)

    def _back(self, value: float) -> float:
        return math.exp(value) if self.is_geometric else value


class Curve(NamedTuple):
    """A curve to plot: x (n,), y (n,) or (n, layers), and half of its 95 % interval (n,)."""

    x: list[float]
    y: list[Any]
    half: list[float] | None = None

    @classmethod
    def of_runs(cls, curves: Sequence[tuple[Iterable[float], Iterable[float]]]) -> "Curve":
        """The mean of several (x, y), as far as all of them go, with Student's interval."""
        listed = [(list(map(float, x)), list(map(float, y))) for x, y in curves]
        length = min(len(x) for x, _ in listed)
        values = np.array([y[:length] for _, y in listed])
        half = None
        if len(listed) > 1:
            points = [Estimate.of(draws) for draws in values.T]
            half = [point.interval()[1] - point.mean for point in points]
        return cls(listed[0][0][:length], values.mean(0).tolist(), half)

    @classmethod
    def by_epoch(cls, losses: Sequence[np.ndarray]) -> "Curve":
        """The mean of the losses (epochs,) of several runs, from epoch 1 on."""
        return cls.of_runs([(range(1, len(loss) + 1), loss) for loss in losses])


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
    """All that an experiment found at a scale.

    Attributes:
      remarks: sentences on what decides nothing, such as secondary outcomes.
      levels: horizontal lines of the plot by their label, such as the entropies of a text.
    """

    experiment: str
    scale: str
    rows: list[Row]
    claims: list[Claim] = dataclasses.field(default_factory=list)
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)
    levels: dict[str, float] = dataclasses.field(default_factory=dict)
    made: Made | None = None

    def paper(self, row: Row) -> Published | None:
        """The paper's number for a row; None if it has none or ours is reduced."""
        found = published(self.experiment).get((row.setting, row.quantity))
        return None if row.reduced else found

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
            [Claim(*c)._replace(interval=tuple(c[5]) if c[5] else None) for c in content["claims"]],
            {name: Curve(*curve) for name, curve in content["curves"].items()},
            content["remarks"],
            content["levels"],
            Made(*made) if (made := content.get("made")) else None,
        )

    def csv(self) -> str:
        """The rows as CSV; unknown values are empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            paper = self.paper(row)
            ours = (row.mean, *(row.interval or (None, None)))
            counts = (len(row.ours), len(row.ours) - row.ours.count(None))
            theirs = (paper.text, paper.error, paper.source) if paper else (None,) * 3
            head = (self.experiment, self.scale, row.setting, row.quantity)
            writer.writerow((*head, *ours, *counts, row.reduced, *theirs))
        return out.getvalue()


def find(rows: Iterable[Row], setting: str, quantity: str) -> Row:
    """The row of a setting and a quantity."""
    return next(row for row in rows if (row.setting, row.quantity) == (setting, quantity))


def finite(tree: Any) -> Any:
    """The tree with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def quoted(values: Iterable[float | None]) -> str:
    """The numbers, separated by commas."""
    return ", ".join("none" if value is None else number(value) for value in values)
