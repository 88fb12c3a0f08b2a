"""The results of an experiment: one table of records, the claims on it, and the curves to plot."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from experiments.jobs import DESCRIPTIONS
from experiments.published import INFORMATIVE, Claim, Published, lies_in, published
from experiments.statistics import (
    LEVEL,
    Censored,
    Draw,
    Draws,
    Interval,
    Sample,
    between,
    holds,
    paired,
    together,
    verdict,
)
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.formatting import number
from rezero_jax.runs.files import replace_file
from rezero_jax.runs.reader import Run

COLUMNS = ("setting", "size", "rate", "metric", "seed", "value", "status")  # of a record
FLAGS = ("reduced", "log")  # of a row; a file lists the rows that have each
CENSORED, DIVERGED, UNDEFINED = "right-censored", "diverged", "undefined"  # "" where all is well
ALPHA_AT_END = "mean |alpha| at the end"  # a metric
Runs: TypeAlias = Mapping[str, Sequence[Run]]  # of each setting, by seed


@dataclasses.dataclass(frozen=True)
class Row(Draws):
    """The records of one metric in one setting, a draw for each seed."""

    setting: str  # as in published.csv, like the metric; of a comparison the residual rule
    metric: str
    draws: tuple[Draw, ...]
    reduced: bool = False  # ours is smaller than the paper's: no number of it is shown beside
    log: bool = False
    size: int | None = None  # the depth or width, where an experiment varies one
    rate: float | None = None  # the learning rate, where it is tuned
    seed: int = 0  # of the first draw; the others follow


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

    @classmethod
    def logged(cls, runs: Sequence[Run], key: str = "train/loss", x: str = "step") -> "Curve":
        """The mean of a logged metric over runs."""
        return cls.of_runs([run.series(key, x) for run in runs])


class Made(NamedTuple):
    """How results were made."""

    command: str  # of `experiments`
    device: str  # of the runs
    seconds: float  # of all runs, one after another, and of the computations on them
    runs: list[str]  # their commands


@dataclasses.dataclass
class Results:
    """All that an experiment found at a scale: "paper", "cpu", "smoke", or "" if it has none."""

    experiment: str
    scale: str
    rows: list[Row] = dataclasses.field(default_factory=list)
    claims: list[Claim] = dataclasses.field(default_factory=list)
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)  # on secondary outcomes
    levels: dict[str, float] = dataclasses.field(default_factory=dict)  # lines, such as entropies
    made: Made | None = None

    @property
    def reduced(self) -> bool:
        """Whether our setting at this scale is smaller than the paper's."""
        described = DESCRIPTIONS.get(self.experiment)
        return described is not None and self.scale not in described.full

    def add(self, setting: str, metric: str, draws: Iterable[Draw], **fields: Any) -> None:
        """Adds a row, reduced unless the scale has the paper's setting; see `Row`."""
        fields = {"reduced": self.reduced} | fields
        self.rows.append(Row(setting, metric, tuple(draws), **fields))

    def row(self, setting: str, metric: str) -> Row:
        return next(r for r in self.rows if (r.setting, r.metric) == (setting, metric))

    def differences(self, metric: str, one: str, other: str) -> tuple[Draw, ...]:
        """A metric of one setting minus that of another, in pairs of seeds."""
        return paired(self.row(one, metric).draws, self.row(other, metric).draws)

    def claim(
        self, text: str, source: str, holds: bool | None, evidence: str, n: int = 1, **fields: Any
    ) -> None:
        """Adds a claim, which a reduced scale does not test; see `Claim`."""
        fields = {"reduced": self.reduced} | fields
        self.claims.append(Claim(text, source, holds, evidence, n, **fields))

    def bounded(
        self,
        text: str,
        source: str,
        quantity: str,
        draws: Iterable[Draw],
        low: float = -math.inf,
        high: float = math.inf,
        **fields: Any,
    ) -> None:
        """Adds the claim that a mean lies between `low` and `high`, by its 95 % interval."""
        sample = Sample(draws)
        interval, n = sample.interval(), len(sample.draws)
        evidence = f"{quantity}: {sample.shown if sample.mean is None else number(sample.mean)}"
        if n == 1 and sample.mean is not None:
            evidence += " in a single run"
        found = holds(verdict(interval, low, high))
        self.claim(text, source, found, evidence, n, interval=interval, **fields)

    def counted(self, text: str, source: str, evidence: str, count: int, n: int) -> None:
        """Adds the claim that something happened in all n runs; in some is not significant."""
        self.claim(text, source, None if 0 < count < n else count == n, evidence, n)

    def one_more_run(self, text: str, rows: Sequence[Row], tests: int) -> None:
        """Adds the claim that the one run of a notebook could be one more run of ours.

        The claim holds if each printed number lies in the 95 % prediction interval of its row, and
        is contradicted if one lies outside the interval of confidence 1 - LEVEL / tests, where
        `tests` numbers are tested by all such claims of the experiment.
        """
        theirs = published(self.experiment)
        parts, outside, widths = list[bool | None](), list[str](), list[tuple[float, Interval]]()
        for row in rows:
            paper, interval = theirs[row.setting, row.metric], row.prediction()
            if interval is None:
                parts.append(None)
                continue
            widths.append((interval[1] / interval[0] if interval[0] > 0 else math.inf, interval))
            inside = lies_in(interval, paper)
            wide = row.prediction(LEVEL / tests)
            parts.append(inside or (None if wide and lies_in(wide, paper) else False))
            if not inside:
                outside.append(row.metric)
        evidence, widest = "fewer than two runs have every number", max(widths, default=None)
        if widest:
            where = f"{', '.join(outside)} outside" if outside else "all numbers inside"
            evidence = f"{where} our 95 % prediction intervals (widest: {between(widest[1])})"
        source, n = theirs[rows[0].setting, rows[0].metric].source, len(rows[0].draws)
        weak = bool(widest and widest[0] > INFORMATIVE)
        self.claim(text, source, together(parts), evidence, n, weak=weak)

    def paper(self, row: Row) -> Published | None:
        """The paper's number for a row; None if it has none or ours is reduced."""
        found = published(self.experiment).get((row.setting, row.metric))
        return None if row.reduced else found

    def write(self, folder: Path) -> Path:
        """Writes NAME.json, in which each record and each curve has a line; returns its path."""
        names = ("experiment", "scale", "made", "levels", "remarks", "claims")
        head = {name: getattr(self, name) for name in names}
        head["made"] = self.made and self.made._asdict()
        head["claims"] = [claim._asdict() for claim in self.claims]
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
        content = json.loads(path.read_text())
        names = ("experiment", "scale", "remarks", "levels")
        return cls(
            **{name: content[name] for name in names},
            rows=list(_rows(content)),
            claims=[Claim.of_json(fields) for fields in content["claims"]],
            curves={name: Curve(*curve) for name, *curve in content["curves"]},
            made=Made(**made) if (made := content["made"]) else None,
        )


def _records(rows: Iterable[Row]) -> Iterable[tuple]:
    for row in rows:
        for seed, draw in enumerate(row.draws, row.seed):
            status = CENSORED if isinstance(draw, Censored) else ""
            if draw is None or not math.isfinite(draw):
                status = DIVERGED if draw is None else UNDEFINED
            yield row.setting, row.size, row.rate, row.metric, seed, draw, status


def _rows(content: Mapping[str, Any]) -> Iterable[Row]:
    """The rows of a file: records that differ in consecutive seeds alone are one row."""

    def key(pair: tuple[int, Sequence[Any]]) -> tuple[Sequence[Any], int]:
        place, record = pair
        return record[:4], record[4] - place

    for ((setting, size, rate, metric), _), group in groupby(enumerate(content["records"]), key):
        seeds, values, statuses = zip(*(record[4:] for _, record in group), strict=True)
        draws = tuple(map(_draw, values, statuses))
        flags = {flag: [setting, metric] in content[flag] for flag in FLAGS}
        yield Row(setting, metric, draws, **flags, size=size, rate=rate, seed=seeds[0])


def _draw(value: float | None, status: str) -> Draw:
    if value is None:
        return math.nan if status == UNDEFINED else None
    return Censored(value) if status == CENSORED else value


def finite(tree: Any) -> Any:
    """The tree with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def times_to(runs: Sequence[Run], metric: str, target: float) -> tuple[float, ...]:
    """When each run reached a target, see `Run.time_to`; right-censored at the end of the run."""
    unit = "epoch" if metric != "bits_per_byte" else "step"
    times = []
    for run in runs:
        time = run.time_to(metric, target)
        if time is None:  # a run that diverged early is censored at the end that it was given
            epochs = run.config["train.epochs"] if unit == "epoch" else None
            time = Censored(epochs or (run.lines[-1][unit] if run.lines else run.final()["steps"]))
        times.append(time)
    return tuple(times)


def gates_at_end(runs: Sequence[Run]) -> tuple[float, ...]:
    """The mean |alpha| over the layers of each run in its last logged line."""
    return tuple(float(np.abs(run.alphas()[1][-1]).mean()) for run in runs)
