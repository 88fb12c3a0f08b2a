"""Compares residual rules by depth: each at its own best learning rate, with seeds and intervals.

For every rule and depth the learning rate is tuned on a grid around the config's own, on seeds of
its own, by the final test loss; the grid is extended while the best rate lies at its edge. With the
best rate each rule then has runs of seeds 0, 1, ..., which see the same batches in the same order
under every rule. The first rule is the one that the others are compared with. A rule rezero_held is
ReZero with every alpha held at 0: a net that is no better has learned nothing with its layers.

The report is DIR/report.html and DIR/report.md; the numbers are in DIR/comparison.json.
"""

import argparse
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import arguments, compare_report, entropies
from experiments.comparison import NO_LAYERS, Cell, Comparison
from experiments.dry_run import print_costs, trainer_of
from experiments.jobs import HELD, Job
from experiments.running import execute
from experiments.tuning import Grid
from rezero_jax import command, devices
from rezero_jax.errors import UserError
from rezero_jax.runs.reader import Run

TUNING = 100  # the first seed of those that rates are tuned on
EXAMPLES = """\
examples:
  three rules at two depths in some minutes, on embedded data:
    python -m experiments compare --config=configs/mlp.py:epochs=3 --rules=rezero,residual,norm \\
      --depths=8,32 --seeds=3 --jobs=2 --out=runs/compare
  what it would take, before it starts:
    python -m experiments compare --config=configs/mlp.py:dataset=cifar10 --rules=rezero,norm \\
      --depths=8,32,128 --seeds=5 --dry-run --out=runs/compare_cifar

exit status: 0 all done; 2 something failed, told in a sentence; 130 or 143 stopped by Ctrl-C or
SIGTERM with all runs saved, and the same command resumes them.
"""


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
        residual, held = ("rezero", HELD) if rule == NO_LAYERS else (rule, ())
        config = arguments.with_arguments(self.config, f"residual={residual}", f"depth={depth}")
        overrides = (*self.overrides, f"optim.learning_rate={rate:g}", *held, f"seed={seed}")
        name = f"{rule}-{depth}-lr{rate:g}-seed{seed}"
        return Job(f"{rule}, {depth} layers", name, config, overrides)

    def grid(self, rule: str, depth: int) -> Grid:
        """The learning rates of a rule at a depth, around that of its config."""
        half = self.rates // 2
        middle = self.job(rule, depth, 1.0, 0)._replace(overrides=self.overrides).load()
        rate = middle.optim.learning_rate
        return Grid(rate, self.factor, range(-half, self.rates - half))


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
        return _print_costs(plan, out)
    shown = shlex.join(["python", "-m", "experiments", "compare", *argv])
    _compare(plan, out, args.jobs, args.target, shown)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("python -m experiments compare", __doc__, EXAMPLES)
    arguments.add_rules(parser, "depth=", "the first: the control")
    parser.add_argument("--depths", required=True, metavar="N,...")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="reported runs (3)")
    parser.add_argument("--rates", type=int, default=3, metavar="N", help="of the first grid (3)")
    parser.add_argument("--factor", type=float, default=2.0, help="between two rates (2)")
    parser.add_argument("--tuning-seeds", type=int, default=1, metavar="N", help="of a rate (1)")
    parser.add_argument("--target", type=float, metavar="LOSS", help="of training, to be timed to")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once")
    parser.add_argument("--out", default="runs/compare", metavar="DIR", help="(runs/compare)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their time")
    return parser


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    arguments.check_positive(args, "seeds", "rates", "tuning_seeds", "jobs")
    if args.factor <= 1:
        raise UserError(f"--factor={args.factor:g} is not above 1; give one such as 2")
    arguments.check_config(args)
    if any(text.startswith("seed=") for text in overrides):
        raise UserError("--config.seed is what --seeds counts; leave it out")
    depths = args.depths.split(",")
    if not all(depth.isdecimal() and int(depth) for depth in depths):
        raise UserError(f"--depths={args.depths} are not whole numbers above 0; give 8,32")
    plan = Plan(
        args.config,
        tuple(overrides),
        args.rules,
        sorted({int(depth) for depth in depths}),
        args.seeds,
        args.rates,
        args.factor,
        args.tuning_seeds,
    )
    for rule, depth in plan.cells:  # a wrong name is told before anything runs
        trainer_of(plan.job(rule, depth, 1.0, 0).load())
    return plan


def _print_costs(plan: Plan, out: Path) -> int:
    """Every run that is certain beforehand; where a grid grows, there will be more."""
    print_costs(certain(plan), out / "runs")
    print("A grid whose best rate lies at its edge is extended, by a tuning run at a time.")
    return 0


def certain(plan: Plan) -> dict[str, list[Job]]:
    """The runs of the first grids, and the reported ones, here at the middle rate."""
    jobs: dict[str, list[Job]] = {"tuning": [], "reported": []}
    for rule, depth in plan.cells:
        grid = plan.grid(rule, depth)
        for k in grid.first:
            jobs["tuning"] += _tuning(plan, rule, depth, grid.rate(k))
        jobs["reported"] += [plan.job(rule, depth, grid.middle, s) for s in range(plan.seeds)]
    return jobs


def _tuning(plan: Plan, rule: str, depth: int, rate: float) -> list[Job]:
    seeds = range(TUNING, TUNING + plan.tuning_seeds)
    return [plan.job(rule, depth, rate, seed) for seed in seeds]


def _compare(plan: Plan, out: Path, slots: int, target: float | None, shown: str) -> None:
    runs = out / "runs"
    grids = {cell: plan.grid(*cell) for cell in plan.cells}
    losses: dict[tuple[str, int], dict[int, float]] = {cell: {} for cell in plan.cells}
    while jobs := {
        (cell, k): _tuning(plan, *cell, grids[cell].rate(k))
        for cell in plan.cells
        for k in grids[cell].untried(losses[cell])
    }:
        _run((job for of_one in jobs.values() for job in of_one), runs, slots)
        for (cell, k), of_one in jobs.items():
            finals = [_final_loss(runs / job.name) for job in of_one]
            losses[cell][k] = math.fsum(finals) / len(finals)
    reported = {}
    for cell in plan.cells:
        best = grids[cell].best(losses[cell])
        if best is not None:
            rate = grids[cell].rate(best)
            reported[cell] = [plan.job(*cell, rate, seed) for seed in range(plan.seeds)]
    # Seed by seed: what is stopped early has whole seeds, which a smaller --seeds reports.
    _run((job for of_seed in zip(*reported.values(), strict=True) for job in of_seed), runs, slots)
    cells = [
        Cell.of_runs(
            cell,
            {grids[cell].rate(k): loss for k, loss in sorted(losses[cell].items())},
            grids[cell].is_settled(losses[cell]),
            reported.get(cell, []),
            runs,
            target,
        )
        for cell in plan.cells
    ]
    bits = entropies.of_data(plan.job(*plan.cells[0], 1.0, 0).load().data)
    levels = {name: value * math.log(2) for name, value in bits.items()}
    comparison = Comparison(shown, plan.rules[0], target, cells, levels)
    comparison.write(out)
    print(f"report: {compare_report.write(comparison, out)}")


def _run(jobs: Iterable[Job], runs: Path, slots: int) -> None:
    """Runs jobs to their end; one that diverges is a result, one that fails ends everything."""
    failed = [
        sentence
        for _, sentence in execute(
            list(jobs), runs, slots, say=lambda text: print(text, flush=True)
        )
        if sentence
    ]
    if failed:
        raise UserError("; ".join(dict.fromkeys(failed)))


def _final_loss(folder: Path) -> float:
    """Test loss (nats) at the end; infinite if the run diverged."""
    run = Run.read(folder)
    return math.inf if run.diverged else run.final()["eval/loss"]
