"""Compares residual rules by depth: each at its own best learning rate, with seeds and intervals.

For every rule and depth, the learning rate is tuned on separate seeds by the final test loss, on a
grid that is extended while the best rate is at its edge; with --rates=1 every rule has the config's
rate. Runs with the same seed see the same batches. The first rule is the control. The rule
rezero_frozen is ReZero with every alpha frozen at 0: a net that is not better has learned nothing
with its layers.

The report is DIR/report.md; the numbers are in DIR/comparison.json.
"""

import argparse
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import arguments, entropies, report
from experiments.comparison import (
    FLOPS,
    LOSS,
    NO_LAYERS,
    SECONDS,
    TARGET,
    TUNING,
    UPDATES,
    Comparison,
    curve_name,
    reached,
    seconds_of,
)
from experiments.dry_run import print_costs, trainer_of, update_flops
from experiments.jobs import FROZEN, Job
from experiments.results import Curve, Made, Results
from experiments.running import run_all
from experiments.statistics import Censored
from rezero_jax import command, devices
from rezero_jax.errors import UserError
from rezero_jax.runs.reader import Run

FARTHEST = 12  # steps of a grid from its middle, at most
EXAMPLES = f"""\
three rules at two depths in some minutes, on embedded data (--dry-run: what this would take):
  python -m experiments compare --config=configs/mlp.py:epochs=3 --rules=rezero,residual,norm \\
    --depths=8,32 --seeds=3 --jobs=2 --out=runs/compare

{arguments.EXIT_STATUS}"""


class Grid(NamedTuple):
    """Learning rates middle * factor**k for whole k, of which `first` are tried first."""

    middle: float
    factor: float
    first: Sequence[int]

    def rate(self, k: int) -> float:
        """The learning rate of k, rounded to four digits so that commands show it exactly."""
        return float(f"{self.middle * self.factor**k:.4g}")

    def untried(self, losses: Mapping[int, float]) -> list[int]:
        """The k to try next by final loss; empty once both neighbours of the best are worse.

        A grid of one rate is not extended.
        """
        if missing := [k for k in self.first if k not in losses]:
            return missing
        if len(self.first) == 1:
            return []
        best = best_of(losses)
        beyond = [min(losses) - 1] if best is None else [best - 1, best + 1]
        return [k for k in beyond if k not in losses and abs(k) <= FARTHEST]


def best_of(losses: Mapping[int, float]) -> int | None:
    """The k of the lowest loss, the smaller of two equal ones; None if all diverged."""
    finite = {k: loss for k, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda k: (finite[k], k), default=None)


class Plan(NamedTuple):
    """What is compared: `config` is "NAME.py:KEY=VALUE,...", without rule and depth."""

    config: str
    overrides: tuple[str, ...]
    rules: Sequence[str]
    depths: Sequence[int]
    seeds: int
    rates: int
    factor: float
    tuning_seeds: int

    @property
    def cells(self) -> list[tuple[str, int]]:
        return [(rule, depth) for depth in self.depths for rule in self.rules]

    def job(self, rule: str, depth: int, rate: float, seed: int) -> Job:
        residual, frozen = ("rezero", FROZEN) if rule == NO_LAYERS else (rule, ())
        config = arguments.with_arguments(self.config, f"residual={residual}", f"depth={depth}")
        overrides = (*self.overrides, f"optim.learning_rate={rate:g}", *frozen, f"seed={seed}")
        name = f"{rule}-{depth}-lr{rate:g}-seed{seed}"
        return Job(f"{rule}, {depth} layers", name, config, overrides)

    def reported(self, rule: str, depth: int, rate: float) -> list[Job]:
        return [self.job(rule, depth, rate, seed) for seed in range(self.seeds)]

    def tuned(self, rule: str, depth: int, rate: float) -> list[Job]:
        return [self.job(rule, depth, rate, TUNING + i) for i in range(self.tuning_seeds)]

    def grid(self, rule: str, depth: int) -> Grid:
        """The learning rates of a rule at a depth, around that of its config."""
        half = self.rates // 2
        middle = self.job(rule, depth, 1.0, 0)._replace(overrides=self.overrides).load()
        rate = middle.optim.learning_rate
        return Grid(rate, self.factor, range(-half, self.rates - half))

    def certain(self) -> dict[str, list[Job]]:
        """The runs of the initial grids, and the reported ones at the middle rate."""
        jobs: dict[str, list[Job]] = {"tuning": [], "reported": []}
        for cell in self.cells:
            grid = self.grid(*cell)
            jobs["tuning"] += [j for k in grid.first for j in self.tuned(*cell, grid.rate(k))]
            jobs["reported"] += self.reported(*cell, grid.middle)
        return jobs


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status; raises UserError or Stopped."""
    args, plan = parsed(argv)
    devices.use_cpu()  # leaves the accelerators to the runs
    for rule, depth in plan.cells:  # raises for a wrong name or size before anything runs
        loaded = plan.job(rule, depth, 1.0, 0).load()
        arguments.check_size(args.config, loaded.model, "depth", depth)
        trainer_of(loaded)
    out = Path(args.out).expanduser()
    if args.dry_run:
        print_costs(plan.certain(), out / "runs")
        print("A grid whose best rate is at its edge is extended, by one tuning run at a time.")
        return 0
    shown = shlex.join(["python", "-m", "experiments", "compare", *argv])
    results = _compare(plan, out, args.jobs, args.target, shown)
    results.write(out)
    comparison = Comparison(results)
    print(f"\n{report.by_depth(comparison, report.loss_and_difference)}\n")
    print(f"report: {report.write_comparison(comparison, out)}")
    return 0


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, Plan]:
    """The flags and the plan of a command line."""
    parser = command.parser("python -m experiments compare", __doc__, EXAMPLES)
    arguments.add_rules(parser, "depth=", "residual rules, the control first")
    parser.add_argument(
        "--depths", required=True, type=arguments.sizes, metavar="N,...", help="numbers of layers"
    )
    arguments.add_count(parser, "seeds", "reported runs of each rule and depth", 3)
    arguments.add_count(parser, "rates", "learning rates in the initial grid; 1: the config's", 3)
    text = "ratio of neighbouring rates (default: 2)"
    parser.add_argument("--factor", type=float, default=2.0, help=text)
    arguments.add_count(parser, "tuning-seeds", "runs of each learning rate", 1)
    text = "training loss at which to record the update"
    parser.add_argument("--target", type=float, metavar="LOSS", help=text)
    arguments.add_count(parser, "jobs", "runs at the same time", 1)
    text = "output folder (default: runs/compare)"
    parser.add_argument("--out", default="runs/compare", metavar="DIR", help=text)
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their time")
    args, overrides = arguments.parse(parser, argv)
    if args.factor <= 1:
        raise UserError(f"--factor={args.factor:g} is not above 1; give a factor such as 2")
    if any(text.startswith("seed=") for text in overrides):
        raise UserError("--config.seed conflicts with --seeds, which sets it; leave it out")
    rest = (args.depths, args.seeds, args.rates, args.factor, args.tuning_seeds)
    return args, Plan(args.config, tuple(overrides), args.rules, *rest)


def _compare(plan: Plan, out: Path, slots: int, target: float | None, shown: str) -> Results:
    """Tunes each rule, runs it at its best rate, and measures the runs."""
    grids = {cell: plan.grid(*cell) for cell in plan.cells}
    losses: dict[tuple[str, int], dict[int, list[float | None]]] = {c: {} for c in plan.cells}
    while jobs := {
        (cell, k): plan.tuned(*cell, grids[cell].rate(k))
        for cell in plan.cells
        for k in grids[cell].untried(_means(losses[cell]))
    }:
        runs = run_jobs((job for of_one in jobs.values() for job in of_one), out, slots)
        for (cell, k), of_one in jobs.items():
            losses[cell][k] = [final_loss(runs[job.name]) for job in of_one]
    reported = {}
    for cell in plan.cells:
        if (best := best_of(_means(losses[cell]))) is not None:
            reported[cell] = plan.reported(*cell, grids[cell].rate(best))
    # Seed by seed: a stopped comparison has complete seeds, which a smaller --seeds reports.
    jobs_by_seed = (job for of_seed in zip(*reported.values(), strict=True) for job in of_seed)
    runs |= run_jobs(jobs_by_seed, out, slots)
    results = Results("comparison", "")
    for cell, of_rates in losses.items():
        rule, depth = cell
        for k, draws in sorted(of_rates.items()):
            results.add(rule, LOSS, draws, size=depth, rate=grids[cell].rate(k), seed=TUNING)
        if of_cell := reported.get(cell):
            _measure(results, cell, of_cell[0], [runs[job.name] for job in of_cell], target)
    of_reported = [job for of_cell in reported.values() for job in of_cell]
    devices = "; ".join(dict.fromkeys(runs[job.name].device for job in of_reported))
    bits = entropies.of_run(next(iter(runs.values())).folder)
    results.levels = {name: value * math.log(2) for name, value in bits.items()}
    seconds = seconds_of(Comparison(results).cells)
    results.made = Made(shown, devices, seconds, [job.shown for job in of_reported])
    return results


def _measure(
    results: Results, cell: tuple[str, int], job: Job, runs: Sequence[Run], target: float | None
) -> None:
    """Adds the rows of a cell's reported runs, of which `job` is one, and their finite curves."""
    rule, depth = cell
    config = job.load()
    updates, flops = update_flops(config)
    times, seconds = [], []
    for seed, run in enumerate(runs):
        time = None
        if not run.diverged:
            steps, losses = run.series("train/loss")
            curve = Curve(steps.astype(int).tolist(), losses.round(5).tolist())
            results.curves[curve_name(rule, depth, seed)] = curve
            seconds.append(float(np.median(run.series("time/step")[1])))
            time = reached(curve, target) if target is not None else None
        times.append(Censored(updates) if time is None else time)
    rate = config.optim.learning_rate
    results.add(rule, LOSS, map(final_loss, runs), size=depth, rate=rate)
    if target is not None:
        results.add(rule, f"{TARGET} {target:g}", times, size=depth)
    mean = float(np.mean(seconds)) if seconds else math.nan
    for name, value in {UPDATES: updates, FLOPS: flops, SECONDS: mean}.items():
        results.add(rule, name, (value,), size=depth)


def run_jobs(jobs: Iterable[Job], out: Path, slots: int) -> dict[str, Run]:
    """Runs jobs to their end; one that diverges is a result, one that fails ends everything."""
    listed = list(jobs)
    if failed := [sentence for _, sentence in run_all(listed, out / "runs", slots) if sentence]:
        raise UserError("; ".join(dict.fromkeys(failed)))
    return {job.name: Run.read(out / "runs" / job.name) for job in listed}


def final_loss(run: Run) -> float | None:
    """Test loss (nats) at the end; None if the run diverged."""
    return None if run.diverged else run.final()["eval/loss"]


def _means(losses: dict[int, list[float | None]]) -> dict[int, float]:
    """The mean loss by step of the grid; infinite where a run diverged."""
    return {
        k: math.inf if None in draws else math.fsum(d for d in draws if d is not None) / len(draws)
        for k, draws in losses.items()
    }
