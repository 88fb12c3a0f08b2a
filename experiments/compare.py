"""Compares residual rules by depth: each at its own best learning rate, with seeds and intervals.

For every rule and depth the learning rate is tuned on a grid around the config's own, on separate
seeds, by the final test loss; the grid is extended while the best rate is at its edge. With the
best rate each rule then has runs of seeds 0, 1, ..., which see the same batches in the same order
under every rule. The first rule is the control that the others are compared with. The rule
rezero_frozen is ReZero with every alpha frozen at 0: a net that is no better has learned nothing
with its layers.

The report is DIR/report.md; the numbers are in DIR/comparison.json.
"""

import argparse
import math
import shlex
from collections.abc import Iterable, Sequence
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
from experiments.results import Curve, Made, Results, Row
from experiments.running import run_all
from experiments.statistics import Censored
from experiments.tuning import Grid
from rezero_jax import command, devices
from rezero_jax.errors import UserError
from rezero_jax.runs.reader import Run

EXAMPLES = f"""\
examples:
  three rules at two depths in some minutes, on embedded data:
    python -m experiments compare --config=configs/mlp.py:epochs=3 --rules=rezero,residual,norm \\
      --depths=8,32 --seeds=3 --jobs=2 --out=runs/compare
  what a comparison would take, before it starts:
    python -m experiments compare --config=configs/mlp.py:dataset=cifar10 --rules=rezero,norm \\
      --depths=8,32,128 --seeds=5 --dry-run --out=runs/compare_cifar

{arguments.EXIT_STATUS}"""


class Plan(NamedTuple):
    """What is compared: `config` is "configs/NAME.py:KEY=VALUE,...", without rule and depth."""

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
        """Every rule at every depth."""
        return [(rule, depth) for depth in self.depths for rule in self.rules]

    def job(self, rule: str, depth: int, rate: float, seed: int) -> Job:
        """The run of a rule, depth, learning rate and seed."""
        residual, frozen = ("rezero", FROZEN) if rule == NO_LAYERS else (rule, ())
        config = arguments.with_arguments(self.config, f"residual={residual}", f"depth={depth}")
        overrides = (*self.overrides, f"optim.learning_rate={rate:g}", *frozen, f"seed={seed}")
        name = f"{rule}-{depth}-lr{rate:g}-seed{seed}"
        return Job(f"{rule}, {depth} layers", name, config, overrides)

    def reported(self, rule: str, depth: int, rate: float) -> list[Job]:
        """The reported runs of a rule and depth."""
        return [self.job(rule, depth, rate, seed) for seed in range(self.seeds)]

    def tuned(self, rule: str, depth: int, rate: float) -> list[Job]:
        """The runs that try a learning rate."""
        seeds = range(TUNING, TUNING + self.tuning_seeds)
        return [self.job(rule, depth, rate, seed) for seed in seeds]

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
    """Runs the command line and returns the exit status.

    Raises:
      UserError: a flag is wrong, or a run failed.
      Stopped: on SIGINT or SIGTERM.
    """
    args, overrides = arguments.parse(_parser(), argv)
    devices.use_cpu()  # leaves the accelerators to the runs
    plan, out = _plan(args, overrides), Path(args.out)
    if args.dry_run:
        print_costs(plan.certain(), out / "runs")
        print("A grid whose best rate is at its edge is extended, by one tuning run at a time.")
        return 0
    shown = shlex.join(["python", "-m", "experiments", "compare", *argv])
    _compare(plan, out, args.jobs, args.target, shown)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("python -m experiments compare", __doc__, EXAMPLES)
    arguments.add_rules(parser, "depth=", "residual rules, the control first")
    parser.add_argument("--depths", required=True, metavar="N,...", help="numbers of layers")
    arguments.add_count(parser, "seeds", 3, "reported runs of each rule and depth")
    arguments.add_count(parser, "rates", 3, "learning rates in the initial grid")
    parser.add_argument(
        "--factor", type=float, default=2.0, help="ratio of neighbouring rates (default: 2)"
    )
    arguments.add_count(parser, "tuning-seeds", 1, "runs of each learning rate")
    parser.add_argument(
        "--target", type=float, metavar="LOSS", help="training loss at which to record the update"
    )
    arguments.add_count(parser, "jobs", 1, "runs at the same time")
    arguments.add_out(parser, "runs/compare")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their time")
    return parser


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    arguments.check_positive(args, "seeds", "rates", "tuning_seeds", "jobs")
    if args.factor <= 1:
        raise UserError(f"--factor={args.factor:g} is not above 1; give a factor such as 2")
    arguments.check_config(args)
    if any(text.startswith("seed=") for text in overrides):
        raise UserError("--config.seed conflicts with --seeds, which sets it; leave it out")
    depths = arguments.sizes("depths", args.depths)
    rest = (args.seeds, args.rates, args.factor, args.tuning_seeds)
    plan = Plan(args.config, tuple(overrides), args.rules, depths, *rest)
    for rule, depth in plan.cells:  # raises for a wrong name before anything runs
        trainer_of(plan.job(rule, depth, 1.0, 0).load())
    return plan


def _compare(plan: Plan, out: Path, slots: int, target: float | None, shown: str) -> None:
    """Tunes, runs and reports."""
    grids = {cell: plan.grid(*cell) for cell in plan.cells}
    losses: dict[tuple[str, int], dict[int, list[float | None]]] = {c: {} for c in plan.cells}
    while jobs := {
        (cell, k): plan.tuned(*cell, grids[cell].rate(k))
        for cell in plan.cells
        for k in grids[cell].untried(_means(losses[cell]))
    }:
        runs = _run((job for of_one in jobs.values() for job in of_one), out, slots)
        for (cell, k), of_one in jobs.items():
            losses[cell][k] = [_final_loss(runs[job.name]) for job in of_one]
    reported = {}
    for cell in plan.cells:
        best = grids[cell].best(_means(losses[cell]))
        if best is not None:
            reported[cell] = plan.reported(*cell, grids[cell].rate(best))
    # Seed by seed: a stopped comparison has complete seeds, which a smaller --seeds reports.
    jobs_by_seed = (job for of_seed in zip(*reported.values(), strict=True) for job in of_seed)
    runs = _run(jobs_by_seed, out, slots)
    rows, curves = list[Row](), dict[str, Curve]()
    for (rule, depth), of_rates in losses.items():
        for k, draws in sorted(of_rates.items()):
            rate = grids[rule, depth].rate(k)
            row = Row(rule, LOSS, tuple(draws), size=depth, rate=rate, seed=TUNING)
            rows.append(row)
        if of_cell := reported.get((rule, depth)):
            finished = [runs[job.name] for job in of_cell]
            rows += _measure(rule, depth, of_cell, finished, target, curves)
    bits = entropies.of_data(plan.job(*plan.cells[0], 1.0, 0).load().data)
    levels = {name: value * math.log(2) for name, value in bits.items()}
    device = "; ".join(dict.fromkeys(run.device for run in runs.values()))
    results = Results("comparison", "", rows, curves=curves, levels=levels)
    seconds = seconds_of(Comparison(results).cells)
    commands = [job.shown for of_cell in reported.values() for job in of_cell]
    results = Results(
        *("comparison", "", rows, [], curves, [], levels), Made(shown, device, seconds, commands)
    )
    results.write(out)
    print(f"report: {report.write_comparison(Comparison(results), out)}")


def _measure(
    rule: str,
    depth: int,
    jobs: Sequence[Job],
    runs: Sequence[Run],
    target: float | None,
    curves: dict[str, Curve],
) -> list[Row]:
    """The rows of reported runs; adds the curves of those that did not diverge."""
    config = jobs[0].load()
    updates, flops = update_flops(config)
    times, seconds = [], []
    for seed, run in enumerate(runs):
        time = None
        if not run.diverged:
            steps, losses = run.series("train/loss")
            curve = Curve(steps.astype(int).tolist(), losses.round(5).tolist())
            curves[curve_name(rule, depth, seed)] = curve
            seconds.append(float(np.median(run.series("time/step")[1])))
            time = reached(curve, target) if target is not None else None
        times.append(Censored(updates) if time is None else time)
    final = tuple(map(_final_loss, runs))
    rows = [Row(rule, LOSS, final, size=depth, rate=config.optim.learning_rate)]
    if target is not None:
        rows.append(Row(rule, f"{TARGET} {target:g}", tuple(times), size=depth))
    mean = float(np.mean(seconds)) if seconds else math.nan
    numbers = {UPDATES: updates, FLOPS: flops, SECONDS: mean}
    return rows + [Row(rule, name, (value,), size=depth) for name, value in numbers.items()]


def _run(jobs: Iterable[Job], out: Path, slots: int) -> dict[str, Run]:
    """Runs jobs to their end; one that diverges is a result, one that fails ends everything."""
    listed = list(jobs)
    if failed := [sentence for _, sentence in run_all(listed, out / "runs", slots) if sentence]:
        raise UserError("; ".join(dict.fromkeys(failed)))
    return {job.name: Run.read(out / "runs" / job.name) for job in listed}


def _final_loss(run: Run) -> float | None:
    """Test loss (nats) at the end; None if the run diverged."""
    return None if run.diverged else run.final()["eval/loss"]


def _means(losses: dict[int, list[float | None]]) -> dict[int, float]:
    """The mean loss by step of the grid; infinite where a run diverged."""
    return {
        k: math.inf if None in draws else math.fsum(d for d in draws if d is not None) / len(draws)
        for k, draws in losses.items()
    }
