"""A comparison of residual rules: its cells, and which differences are significant.

Its results have the rule as setting, the first one being the control, and the depth as size.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from experiments.results import Curve, Results
from experiments.statistics import LEVEL, Sample, dunnett, paired, quotients, verdict

TUNING = 100  # the first seed of those that learning rates are tuned on
WINDOW = 0.05  # of the updates, over which a training loss is averaged
SMOOTHED = 5  # logged lines at least, in the loss at equal costs
NO_LAYERS = "rezero_frozen"  # the rule: ReZero with every alpha frozen at 0
BROKEN = 10  # times the median rule's loss: a net that is worse has not trained
LOSS, TARGET = "test loss", "updates to a training loss of"  # metrics in nats, the latter + number
UPDATES, FLOPS, SECONDS = "updates", "FLOPs of an update", "seconds of an update"


def curve_name(rule: str, depth: int, seed: int) -> str:
    """The key of a training curve in the results."""
    return f"{rule}, {depth} layers, seed {seed}"


def loss_at(curve: Curve, update: float, lines: int = 0) -> float | None:
    """The mean loss over the WINDOW that ends with an update, or over more: its last `lines` lines.

    None before the first line.
    """
    updates, losses = np.array(curve.x), np.array(curve.y)
    until = updates <= update * (1 + 1e-9)  # a quotient of costs is rounded
    within = until & (updates > update - WINDOW * updates[-1])
    within[np.flatnonzero(until)[-lines:] if lines else []] = True
    return float(losses[within].mean()) if within.any() else None


def reached(curve: Curve, target: float) -> float | None:
    """The first logged update at which the loss, averaged over the WINDOW, is at the target."""
    for update in curve.x:
        if (loss := loss_at(curve, update)) is not None and loss <= target:
            return update
    return None


class Cell:
    """A rule at a depth.

    Attributes:
      tuning: final test loss (nats) by learning rate; infinite where training diverged.
      final: final test loss (nats) of the reported seeds; None if no learning rate trains.
      to_target: updates of each seed to the target, if the comparison has one.
      curves: training loss (nats) by update of each seed that did not diverge.
      updates, flops, seconds: of a run; the latter two per update.
    """

    def __init__(self, results: Results, rule: str, depth: int):
        rows = [row for row in results.rows if (row.setting, row.size) == (rule, depth)]
        losses = [row for row in rows if row.metric == LOSS]
        numbers = {row.metric: row.draws[0] for row in rows}
        self.rule, self.depth = rule, depth
        self.tuning = {
            row.rate: math.inf if row.mean is None else row.mean
            for row in losses
            if row.seed >= TUNING and row.rate is not None
        }
        self.final = next((row for row in losses if row.seed < TUNING), None)
        self.to_target = next((row for row in rows if row.metric.startswith(TARGET)), None)
        seeds = range(len(self.final.draws) if self.final else 0)
        names = (curve_name(rule, depth, seed) for seed in seeds)
        self.curves = [results.curves[name] for name in names if name in results.curves]
        self.updates = int(numbers.get(UPDATES) or 0)
        self.flops, self.seconds = numbers.get(FLOPS) or 0, numbers.get(SECONDS) or math.nan

    @property
    def is_bracketed(self) -> bool:
        """Whether rates on both sides of the best one were tried."""
        return self.final is not None and min(self.tuning) != self.final.rate != max(self.tuning)

    def loss_at(self, update: float) -> float | None:
        """The mean training loss (nats) of the seeds at an update; None if one diverged."""
        values = [loss_at(curve, update, SMOOTHED) for curve in self.curves]
        known = [value for value in values if value is not None]
        complete = self.final is not None and len(known) == len(self.final.draws) > 0
        return float(np.mean(known)) if complete else None


class Difference(NamedTuple):
    """A rule against the control, in pairs of seeds."""

    sample: Sample  # differences of final test losses (nats), or ratios of times to the target
    verdict: str  # Bonferroni: by an interval that is wide enough for all rules and depths at once


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The cells of a comparison's results."""

    results: Results

    @cached_property
    def cells(self) -> list[Cell]:
        """Every rule at every depth, in the order of the command."""
        keys = dict.fromkeys((row.setting, row.size) for row in self.results.rows)
        return [Cell(self.results, rule, depth) for rule, depth in keys if depth]

    @property
    def rules(self) -> list[str]:
        """The rules in the order of the command, the control first."""
        return list(dict.fromkeys(cell.rule for cell in self.cells))

    @property
    def control(self) -> str:
        return self.cells[0].rule

    @property
    def depths(self) -> list[int]:
        return sorted({cell.depth for cell in self.cells})

    @property
    def is_tuned(self) -> bool:
        """Whether several learning rates were tried."""
        return any(len(cell.tuning) > 1 for cell in self.cells)

    @property
    def has_target(self) -> bool:
        return any(row.metric.startswith(TARGET) for row in self.results.rows)

    def at(self, depth: int) -> list[Cell]:
        return [cell for cell in self.cells if cell.depth == depth]

    def of(self, rule: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.rule == rule]

    def control_of(self, cell: Cell) -> Cell:
        return next(c for c in self.at(cell.depth) if c.rule == self.control)

    @property
    def count(self) -> int:
        """Number of differences from the control, over all rules and depths."""
        return max(sum(cell.rule != self.control for cell in self.cells), 1)

    def difference(self, cell: Cell) -> Difference | None:
        """A rule's final test loss minus the control's; None for the control or a diverged run."""
        control = self.control_of(cell)
        if cell is control or cell.final is None or control.final is None:
            return None
        sample = Sample(paired(cell.final.draws, control.final.draws))
        wide = sample.interval(LEVEL / self.count)
        return Difference(sample, verdict(wide, 0)) if wide else None

    def times(self, cell: Cell) -> Difference | None:
        """A rule's updates to the target over the control's; None if the control misses it."""
        control = self.control_of(cell)
        if cell is control or cell.to_target is None or control.to_target is None:
            return None
        if control.to_target.reached < len(control.to_target.draws):
            return None
        sample = Sample(quotients(cell.to_target.draws, control.to_target.draws), log=True)
        return Difference(sample, verdict(sample.interval(LEVEL / self.count), 1))

    @cached_property
    def dunnett(self) -> dict[int, dict[str, str]]:
        """`many_against_one` by depth."""
        return {depth: self.many_against_one(depth) for depth in self.depths}

    def many_against_one(self, depth: int) -> dict[str, str]:
        """Verdicts on the log of the final test loss by Dunnett's test.

        Rules that diverged or are BROKEN are left out: they would swamp the shared variance.
        """
        means = {c.rule: c.final.mean for c in self.at(depth) if c.final and c.final.mean}
        bound = BROKEN * np.median(list(means.values())) if means else 0.0
        logs = {
            cell.rule: [math.log(draw) for draw in cell.final.draws if draw]
            for cell in self.at(depth)
            if cell.final and means.get(cell.rule, math.inf) <= bound
        }
        control = logs.pop(self.control, [])
        if len(control) < 2 or not logs:
            return {}
        intervals = dunnett(control, list(logs.values()))
        return {rule: verdict(ends, 0) for rule, ends in zip(logs, intervals, strict=True)}

    @property
    def noise(self) -> float | None:
        """The noise floor (nats): deviation of final losses between seeds, median of all cells."""
        finals = [cell.final.estimate for cell in self.cells if cell.final]
        deviations = [f.standard_error * math.sqrt(f.count) for f in finals if f and f.count > 1]
        return float(np.median(deviations)) if deviations else None

    def equal(self, cell: Cell, what: str) -> float | None:
        """The training loss (nats) at the flops or seconds of the cheapest rule's whole run."""
        spent = [c.updates * getattr(c, what) for c in self.at(cell.depth) if c.curves]
        cost = getattr(cell, what)
        return cell.loss_at(min(spent) / cost) if spent and cost and cell.curves else None


def seconds_of(cells: Sequence[Cell]) -> float:
    """The time of the updates of all runs, one run after another."""
    runs = [(cell, len(cell.final.draws) + len(cell.tuning)) for cell in cells if cell.final]
    return sum(cell.updates * cell.seconds * count for cell, count in runs)
