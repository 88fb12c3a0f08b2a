"""What a comparison of residual rules measured, and what its intervals decide."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.dry_run import update_flops
from experiments.jobs import Job
from experiments.ratios import Ratio
from experiments.results import finite
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.runs.files import replace_file
from rezero_jax.runs.reader import Run

WINDOW = 0.05  # of the updates, over which a training loss is averaged
CONFIDENCE = 0.95
NO_LAYERS = "rezero_held"  # the rule: ReZero with every alpha held at 0


class Curve(NamedTuple):
    """The training loss (nats) of a run: updates (lines,) and losses (lines,)."""

    updates: list[int]
    losses: list[float]

    def at(self, update: float) -> float | None:
        """The mean over the WINDOW that ends with an update; None before the first line."""
        updates, losses = np.array(self.updates), np.array(self.losses)
        within = (updates <= update) & (updates > update - WINDOW * updates[-1])
        return float(losses[within].mean()) if within.any() else None


@dataclasses.dataclass(frozen=True)
class Cell:
    """A rule at a depth.

    Attributes:
      tuning: final test loss (nats) by learning rate; infinite where training diverged.
      settled: whether the best rate lies inside the rates tried.
      rate: the best one; None if every run diverged.
      losses: final test loss (nats) of each reported seed; infinite if it diverged.
      to_target: updates to the target of each seed; None if not reached, or there is no target.
      curves: of each seed that did not diverge.
      updates, flops, seconds: of a run; the latter two of one update.
    """

    rule: str
    depth: int
    tuning: dict[float, float]
    settled: bool
    rate: float | None
    losses: list[float]
    to_target: list[float | None]
    curves: list[Curve]
    updates: int
    flops: int
    seconds: float
    device: str
    commands: list[str]

    @classmethod
    def of_runs(
        cls,
        cell: tuple[str, int],
        tuning: Mapping[float, float],
        settled: bool,
        jobs: Sequence[Job],
        folder: Path,
        target: float | None,
    ) -> "Cell":
        """The cell of reported runs that are over; of none, if no learning rate trains."""
        runs = [Run.read(folder / job.name) for job in jobs]
        updates, flops = update_flops(jobs[0].load()) if jobs else (0, 0)
        whole = [run for run in runs if not run.diverged]
        times = [np.median(run.series("time/step")[1]) for run in whole]
        curves = [
            Curve(steps.astype(int).tolist(), losses.round(5).tolist())
            for steps, losses in (run.series("train/loss") for run in whole)
        ]
        return cls(
            *cell,
            dict(tuning),
            settled,
            jobs[0].load().optim.learning_rate if jobs else None,
            [math.inf if run.diverged else run.final()["eval/loss"] for run in runs],
            [_reached(curve, target) for curve in curves] if target is not None else [],
            curves,
            updates,
            flops,
            float(np.mean(times)) if times else math.nan,
            "; ".join(dict.fromkeys(run.device for run in runs)),
            [job.shown for job in jobs],
        )

    @classmethod
    def read(cls, fields: dict[str, Any]) -> "Cell":
        """The cell of its JSON."""
        known = {
            "tuning": {float(rate): _loss(loss) for rate, loss in fields["tuning"].items()},
            "losses": [_loss(loss) for loss in fields["losses"]],
            "curves": [Curve(*curve) for curve in fields["curves"]],
            "seconds": math.nan if fields["seconds"] is None else fields["seconds"],
        }
        return cls(**fields | known)

    @property
    def final(self) -> Estimate | None:
        """The final test loss; None unless every seed has one."""
        finite = bool(self.losses) and all(map(math.isfinite, self.losses))
        return Estimate.of(self.losses) if finite else None

    def loss_at(self, update: float) -> float | None:
        """The mean training loss (nats) of the seeds at an update; None if one diverged."""
        values = [curve.at(update) for curve in self.curves]
        if len(values) < len(self.losses) or not values or None in values:
            return None
        return float(np.mean([value for value in values if value is not None]))


def _loss(loss: float | None) -> float:
    """A loss of the JSON, which has no infinity."""
    return math.inf if loss is None else loss


def _reached(curve: Curve, target: float) -> float | None:
    """The first logged update at which the loss, averaged over the WINDOW, is at the target."""
    for update in curve.updates:
        loss = curve.at(update)
        if loss is not None and loss <= target:
            return update
    return None


class Difference(NamedTuple):
    """A rule's final test loss less the control's, in pairs of seeds.

    Attributes:
      mean: nats.
      interval: Student's, 95 %, for this difference alone.
      verdict: "better", "worse" or "undecided", by an interval that is wide enough for all
        differences of the comparison at once (Bonferroni).
    """

    mean: float
    interval: tuple[float, float]
    verdict: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
      control: the rule that the others are held against.
      target: a training loss (nats).
      levels: horizontal lines of the curves (nats) by their label: the entropies of a text.
    """

    command: str
    control: str
    target: float | None
    cells: list[Cell]
    levels: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def depths(self) -> list[int]:
        """In ascending order."""
        return sorted({cell.depth for cell in self.cells})

    @property
    def rules(self) -> list[str]:
        """In the order of the command."""
        return list(dict.fromkeys(cell.rule for cell in self.cells))

    def at(self, depth: int) -> list[Cell]:
        """The cells of a depth."""
        return [cell for cell in self.cells if cell.depth == depth]

    def of(self, rule: str) -> list[Cell]:
        """The cells of a rule."""
        return [cell for cell in self.cells if cell.rule == rule]

    def control_of(self, cell: Cell) -> Cell:
        """The control at the depth of a cell."""
        return next(c for c in self.at(cell.depth) if c.rule == self.control)

    def difference(self, cell: Cell) -> Difference | None:
        """Of a rule to the control; None for the control, one seed, or where a run diverged."""
        control = self.control_of(cell)
        if cell is control or cell.final is None or control.final is None or len(cell.losses) < 2:
            return None
        pairs = zip(cell.losses, control.losses, strict=True)
        estimate = Estimate.of([one - other for one, other in pairs])
        low, high = estimate.interval(1 - (1 - CONFIDENCE) / self.count)
        verdict = "better" if high < 0 else "worse" if low > 0 else "undecided"
        return Difference(estimate.mean, estimate.interval(CONFIDENCE), verdict)

    def times(self, cell: Cell) -> tuple[Ratio, str] | None:
        """A rule's updates to the target over the control's, in pairs of seeds, and a verdict.

        The verdict is "faster", "slower" or "undecided", by an interval as wide as that of
        `difference`. None for the control, without a target, or where the control does not reach
        it; where the rule does not in a run, the ratio is a bound, which decides nothing.
        """
        control = self.control_of(cell)
        n = len(cell.losses)
        if cell is control or not len(cell.to_target) == len(control.to_target) == n > 0:
            return None
        ratio = Ratio.of_pairs(cell.to_target, control.to_target, [cell.updates] * n)
        if ratio is None:
            return None
        low, high = ratio.interval((1 - CONFIDENCE) / self.count) or (0.0, math.inf)
        return ratio, "faster" if high < 1 else "slower" if low > 1 else "undecided"

    @property
    def seconds(self) -> float:
        """What the updates of all runs took, one run after another."""
        runs = [(cell, len(cell.losses) + len(cell.tuning)) for cell in self.cells if cell.losses]
        return sum(cell.updates * cell.seconds * count for cell, count in runs)

    @property
    def count(self) -> int:
        """How many differences are judged."""
        return max(sum(cell.rule != self.control for cell in self.cells), 1)

    @property
    def noise(self) -> float | None:
        """The noise floor: deviation (nats) of the final loss between seeds, median of all cells.

        A pooled one would be that of the worst net: some reach losses of thousands, all finite.
        """
        finals = [cell.final for cell in self.cells]
        deviations = [f.standard_error * math.sqrt(f.count) for f in finals if f and f.count > 1]
        return float(np.median(deviations)) if deviations else None

    def equal(self, cell: Cell, what: str) -> float | None:
        """The training loss where every rule of this depth has spent as much.

        Args:
          what: "flops" or "seconds"; the cheapest rule's whole run is what all may spend.
        """
        spent = [c.updates * getattr(c, what) for c in self.at(cell.depth) if c.curves]
        cost = getattr(cell, what)
        return cell.loss_at(min(spent) / cost) if spent and cost and cell.curves else None

    def write(self, folder: Path) -> None:
        """Writes comparison.json, a line for each cell."""
        names = ("command", "control", "target", "levels")
        head = json.dumps({name: getattr(self, name) for name in names})
        cells = ",\n".join(json.dumps(finite(dataclasses.asdict(cell))) for cell in self.cells)
        replace_file(folder / "comparison.json", f'{head[:-1]}, "cells": [\n{cells}\n]}}\n')

    @classmethod
    def read(cls, folder: Path) -> "Comparison":
        """The comparison of a comparison.json."""
        content = json.loads((folder / "comparison.json").read_text())
        cells = [Cell.read(fields) for fields in content.pop("cells")]
        return cls(**content, cells=cells)
