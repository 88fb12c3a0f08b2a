"""The results of an experiment: one table of records, the claims on it, and the curves to plot."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.claims import Claim
from experiments.published import Published, published
from experiments.statistics import Censored, Draw, Draws
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.runs.files import replace_file
from rezero_jax.runs.reader import Run

COLUMNS = ("setting", "size", "rate", "metric", "seed", "value", "status")  # of a record
FLAGS = ("headline", "reduced", "log")  # of a row; a file lists the rows that have each
CENSORED, DIVERGED, UNDEFINED = "right-censored", "diverged", "undefined"  # "" where all is well


@dataclasses.dataclass(frozen=True)
class Row(Draws):
    """The records of one metric in one setting, a draw for each seed.

    Attributes:
      setting, metric: as in published.csv, where the paper has the number; of a comparison the
        setting is the residual rule.
      headline: whether the row is part of the summary.
      reduced: whether ours is from a smaller experiment than the paper's, so that no number of the
        paper is shown beside it.
      size: the depth or width, where an experiment varies one.
      rate: the learning rate, where it is tuned.
      seed: of the first draw; the others follow.
    """

    setting: str
    metric: str
    draws: tuple[Draw, ...]
    headline: bool = False
    reduced: bool = False
    log: bool = False
    size: int | None = None
    rate: float | None = None
    seed: int = 0


class Curve(NamedTuple):
    """A curve to plot: x (n,), y (n,) or (n, layers), and half of its 95 % interval (n,)."""

    x: list[float]
    y: list[Any]
    half: list[float] | None = None

    @classmethod
    def of_runs(cls, curves: Sequence[tuple[Iterable[float], Iterable[float]]]) -> "Curve":
        """The mean of several (x, y) up to the end of the shortest, with Student's interval."""
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
      scale: "paper", "cpu" or "smoke"; "" for a command that has none.
      remarks: sentences on secondary outcomes.
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
        found = published(self.experiment).get((row.setting, row.metric))
        return None if row.reduced else found

    def write(self, folder: Path) -> Path:
        """Writes NAME.json, in which each record and each curve has a line; returns its path."""
        head: dict[str, Any] = {
            "experiment": self.experiment,
            "scale": self.scale,
            "made": self.made and self.made._asdict(),
            "levels": self.levels,
            "remarks": self.remarks,
            "claims": [claim._asdict() for claim in self.claims],
        }
        for flag in FLAGS:
            marked = (row for row in self.rows if getattr(row, flag))
            head[flag] = list(dict.fromkeys((row.setting, row.metric) for row in marked))
        head["columns"] = COLUMNS
        curves = [(name, *curve) for name, curve in self.curves.items()]
        parts = [f'"{key}": {json.dumps(finite(value))}' for key, value in head.items()]
        for key, lines in (("curves", curves), ("records", _records(self.rows))):
            text = ",\n".join(json.dumps(finite(line)) for line in lines)
            parts.append(f'"{key}": [\n{text}\n]')
        path = folder / f"{self.experiment}.json"
        replace_file(path, "{" + ",\n".join(parts) + "}\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Results":
        """The results that `write` wrote."""
        content = json.loads(path.read_text())
        marked = {flag: {tuple(key) for key in content[flag]} for flag in FLAGS}
        rows = [
            dataclasses.replace(row, **_flags(marked, row)) for row in _rows(content["records"])
        ]
        return cls(
            content["experiment"],
            content["scale"],
            rows,
            [Claim.of_json(fields) for fields in content["claims"]],
            {name: Curve(*curve) for name, *curve in content["curves"]},
            content["remarks"],
            content["levels"],
            Made(**made) if (made := content["made"]) else None,
        )


def _flags(marked: Mapping[str, set[tuple[str, str]]], row: Row) -> dict[str, Any]:
    return {flag: (row.setting, row.metric) in keys for flag, keys in marked.items()}


def _records(rows: Iterable[Row]) -> Iterable[tuple]:
    """The rows as records of COLUMNS."""
    for row in rows:
        for seed, draw in enumerate(row.draws, row.seed):
            status = ""
            if draw is None or not math.isfinite(draw):
                status = DIVERGED if draw is None else UNDEFINED
            elif isinstance(draw, Censored):
                status = CENSORED
            yield row.setting, row.size, row.rate, row.metric, seed, draw, status


def _rows(records: Iterable[Sequence[Any]]) -> Iterable[Row]:
    """The rows of records: those that differ in consecutive seeds alone are one row."""

    def key(pair: tuple[int, Sequence[Any]]) -> tuple[Sequence[Any], int]:
        place, record = pair
        return record[:4], record[4] - place

    for ((setting, size, rate, metric), _), group in groupby(enumerate(records), key):
        seeds, values, statuses = zip(*(record[4:] for _, record in group), strict=True)
        draws = tuple(map(_draw, values, statuses))
        yield Row(setting, metric, draws, size=size, rate=rate, seed=seeds[0])


def _draw(value: float | None, status: str) -> Draw:
    if value is None:
        return math.nan if status == UNDEFINED else None
    return Censored(value) if status == CENSORED else value


def find(rows: Iterable[Row], setting: str, metric: str) -> Row:
    """The row of a setting and a metric."""
    return next(row for row in rows if (row.setting, row.metric) == (setting, metric))


def times_to(runs: Sequence[Run], metric: str, target: float) -> tuple[float, ...]:
    """When each run reached a target, see `Run.time_to`; right-censored at the end of the run."""
    times = (run.time_to(metric, target) for run in runs)
    unit = "epoch" if metric != "bits_per_byte" else "step"
    return tuple(
        Censored(_end(run, unit)) if time is None else time
        for run, time in zip(runs, times, strict=True)
    )


def _end(run: Run, unit: str) -> float:
    """The time that a run was given, so that one which diverged early is censored at the end."""
    if unit == "epoch" and run.config["train.epochs"]:
        return run.config["train.epochs"]
    return run.lines[-1][unit] if run.lines else run.final()["steps"]


def finite(tree: Any) -> Any:
    """The tree with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def gates_at_end(runs: Sequence[Run]) -> tuple[float, ...]:
    """The mean |alpha| over the layers of each run in its last logged line."""
    return tuple(float(np.abs(run.alphas()[1][-1]).mean()) for run in runs)


def training_curve(runs: Sequence[Run], key: str = "train/loss", x: str = "step") -> Curve:
    """The mean of a logged metric over runs."""
    return Curve.of_runs([run.series(key, x) for run in runs])
