"""Runs every combination of config fields, with seeds, and shows the final test losses.

The table is DIR/sweep.md, with the best mean in bold; DIR/sweep.csv has every run. In the picture
(DIR/sweep.png and .svg), the last field of the grid is the horizontal axis, the field before it the
colour, and the field before that the line and the marker. Other fields have a panel for each
combination. The same command resumes.
"""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import arguments, drawing
from experiments.compare import final_loss, run_jobs
from experiments.dry_run import print_costs, trainer_of
from experiments.jobs import Job
from rezero_jax import command, devices
from rezero_jax.analysis.theme import LINES, MARKERS, themed
from rezero_jax.errors import UserError
from rezero_jax.formatting import markdown_table, number
from rezero_jax.runs.files import replace_file
from rezero_jax.runs.reader import Run

EXAMPLES = f"""\
eight settings and two seeds, in some minutes on embedded data (--dry-run: what this would take):
  python -m experiments sweep --config=configs/mlp.py:epochs=3 --seeds=2 --jobs=2 \\
    --grid model.width=32,64 model.depth=4,16 optim.learning_rate=0.003,0.01

{arguments.EXIT_STATUS}"""

Point = tuple[str, ...]  # a value of each field


class Grid(NamedTuple):
    """Fields of the config, and the values of each."""

    fields: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Grid":
        """The grid of texts "a.b=1,2"; raises UserError for anything else or a repeated field."""
        pairs = [text.partition("=")[::2] for text in texts]
        for text, (field, values) in zip(texts, pairs, strict=True):
            if not field or not all(values.split(",")):
                raise UserError(
                    f"--grid {text} is not FIELD=VALUE,...; give such as model.depth=4,8"
                )
        fields = tuple(field for field, _ in pairs)
        if len(set(fields)) < len(fields):
            raise UserError("--grid names a field twice; give each field once, with all its values")
        return cls(fields, tuple(tuple(dict.fromkeys(v.split(","))) for _, v in pairs))

    @property
    def points(self) -> list[Point]:
        """Every combination of values, the last field varying fastest."""
        return list(itertools.product(*self.values))


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status; raises UserError or Stopped."""
    parser = command.parser("python -m experiments sweep", __doc__, EXAMPLES)
    arguments.add_config(parser, "a file of configs/ and its arguments")
    text = "fields of the config and their values"
    parser.add_argument("--grid", required=True, nargs="+", metavar="FIELD=VALUE,...", help=text)
    arguments.add_count(parser, "seeds", "runs of each combination", 1)
    arguments.add_count(parser, "jobs", "runs at the same time", 1)
    text = "output folder (default: runs/sweep)"
    parser.add_argument("--out", default="runs/sweep", metavar="DIR", help=text)
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their time")
    args, overrides = arguments.parse(parser, argv)
    grid, out = Grid.of(args.grid), Path(args.out).expanduser()
    devices.use_cpu()  # leaves the accelerators to the runs
    jobs = {
        (point, seed): _job(args.config, overrides, grid, point, seed)
        for seed in range(args.seeds)
        for point in grid.points
    }
    for point in grid.points:  # raises for a wrong value before anything runs
        trainer_of(jobs[point, 0].load())
    if args.dry_run:
        print_costs({"sweep": list(jobs.values())}, out / "runs")
        return 0
    runs = run_jobs(jobs.values(), out, args.jobs)
    found = {place: runs[job.name] for place, job in jobs.items()}
    losses = {
        point: [final_loss(found[point, seed]) for seed in range(args.seeds)]
        for point in grid.points
    }
    replace_file(out / "sweep.csv", _csv(grid, found))
    text = table(grid, losses)
    replace_file(out / "sweep.md", f"# Final test loss (nats)\n\n{text}\n")
    drawing.save(themed(plot)(grid, losses), out, "sweep")
    print(f"\n{text}\n\nfiles: {out / 'sweep'}.md, .csv, .png, .svg")
    return 0


def _job(config: str, overrides: Sequence[str], grid: Grid, point: Point, seed: int) -> Job:
    chosen = [f"{field}={value}" for field, value in zip(grid.fields, point, strict=True)]
    name = f"{_label(grid.fields, point)}, seed={seed}".replace(", ", "-").replace("/", "_")
    return Job(", ".join(chosen), name, config, (*overrides, *chosen, f"seed={seed}"))


def _csv(grid: Grid, found: Mapping[tuple[Point, int], Run]) -> str:
    """A line for each run: its place in the grid, how it ended, and its final metrics."""
    finals = {place: run.final() for place, run in found.items()}
    keys = dict.fromkeys(
        key for final in finals.values() for key in final if key.startswith(("eval/", "train/"))
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*grid.fields, "seed", "status", *keys))
    for (point, seed), final in finals.items():
        writer.writerow((*point, seed, final.get("status"), *(final.get(key) for key in keys)))
    return text.getvalue()


def _mean(losses: Sequence[float | None]) -> float:
    """The mean loss; infinite if a run diverged."""
    known = [loss for loss in losses if loss is not None]
    return float(np.mean(known)) if len(known) == len(losses) else math.inf


def table(grid: Grid, losses: Mapping[Point, Sequence[float | None]]) -> str:
    """A column for each value of the last field; the mean and range, the best mean in bold."""
    best = min(grid.points, key=lambda point: _mean(losses[point]))

    def cell(point: Point) -> str:
        known = [loss for loss in losses[point] if loss is not None]
        lost = len(losses[point]) - len(known)
        if lost:
            return f"diverged in {lost} of {lost + len(known)}"
        text = number(_mean(known))
        text = f"**{text}**" if point == best else text
        many = len(known) > 1
        return text + (f" ({number(min(known))} to {number(max(known))})" if many else "")

    *fields, last = grid.fields
    rows: list[Sequence[str]] = [(*fields, *(f"{last}={value}" for value in grid.values[-1]))]
    for rest in itertools.product(*grid.values[:-1]):
        rows.append((*rest, *(cell((*rest, value)) for value in grid.values[-1])))
    return markdown_table(rows)


def plot(grid: Grid, losses: Mapping[Point, Sequence[float | None]]) -> Figure:
    """The mean losses and their range over the seeds; a cross for a combination that diverged."""
    lacking = max(3 - len(grid.fields), 0)
    padded = Grid(("",) * lacking + grid.fields, (("",),) * lacking + grid.values)
    lines, colours, columns = padded.values[-3:]
    panels = list(itertools.product(*padded.values[:-3]))
    several = any(len(seeds) > 1 for seeds in losses.values())
    caption = "Look for the lowest point." + several * " Bars: the range over the seeds."
    if any(None in seeds for seeds in losses.values()):
        caption += " Crosses at the top: diverged."
    figure, axes = drawing.sheet("Final test loss (nats)", caption, len(panels), width=4.2)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(colours)))
    for axis, panel in zip(axes, panels, strict=True):
        for (i, line), (k, colour) in itertools.product(enumerate(lines), enumerate(colours)):
            drawn = [losses[tuple(filter(None, (*panel, line, colour, x)))] for x in columns]
            style = {"color": shades[k], "ls": LINES[i % 7], "marker": MARKERS[i % 7]}
            _draw(axis, columns, drawn, style, _label(padded.fields[-3:-1], (line, colour)))
        axis.set(title=_label(padded.fields[:-3], panel), xlabel=padded.fields[-1])
    if len(lines) * len(colours) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    return figure


def _label(fields: Sequence[str], values: Sequence[str]) -> str:
    pairs = (f"{f.rpartition('.')[2]}={v}" for f, v in zip(fields, values, strict=True) if v)
    return ", ".join(pairs)


def _draw(
    axis: Axes,
    columns: Sequence[str],
    drawn: Sequence[Sequence[float | None]],
    style: dict[str, Any],
    label: str,
) -> None:
    """One line; values that are all numbers above 0 are on a logarithmic axis."""
    try:
        x = np.array(columns, float)
    except ValueError:
        x = np.zeros(len(columns))
    if x.min() > 0:
        axis.set_xscale("log")
    else:
        x = np.arange(len(columns), dtype=float)
    axis.set_xticks(x, columns)
    axis.minorticks_off()
    kept = [(place, of) for place, of in zip(x, drawn, strict=True) if None not in of]
    places, means = [place for place, _ in kept], [_mean(of) for _, of in kept]
    axis.plot(places, means, label=label, **style)
    broken = [place for place in x if place not in places]
    at_the_top: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "clip_on": False}
    axis.plot(broken, [1.0] * len(broken), "x", color=style["color"], **at_the_top)
    for place, of in kept:
        ends = [loss for loss in of if loss is not None]
        axis.plot([place] * 2, [min(ends), max(ends)], color=style["color"], lw=2.5, alpha=0.4)
