"""The report of a comparison: a page that refers to no other file, the same in Markdown, plots."""

import base64
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import drawing
from experiments.comparison import CONFIDENCE, Cell, Comparison
from experiments.report import document
from experiments.results import Curve
from rezero_jax.analysis.plots.theme import themed
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.formatting import markdown_table, number

HEAD = (
    "rule",
    "best learning rate",
    "final test loss",
    "less the control's",
    "verdict",
    "FLOPs",
    "time",
    "training loss at equal FLOPs",
    "at equal time",
)
PLOTS = {
    "rates": "Final test loss by learning rate, on the tuning seeds. A cross: training diverged.",
    "curves": "Training loss by update, mean and deviation over the seeds, smoothed.",
}


def write(comparison: Comparison, folder: Path) -> Path:
    """Writes report.html, report.md and the plots; returns the first."""
    for name, plot in {"rates": plot_rates, "curves": plot_curves}.items():
        drawing.save(themed(plot)(comparison), folder, name)
    (folder / "report.md").write_text(markdown(comparison))
    path = folder / "report.html"
    path.write_text(page(comparison, folder))
    return path


def notes(comparison: Comparison) -> list[str]:
    """How to read the numbers."""
    noise = comparison.noise
    floor = (
        f"Between seeds the final loss deviates by {number(noise, 2)} nats (pooled): the noise "
        "floor."
        if noise
        else "Without several seeds there is no noise floor, and nothing is decided."
    )
    return [
        f"{CONFIDENCE:.0%} intervals are Student's: of the mean, and of the mean difference of "
        f"pairs of runs with the same seed. A verdict takes an interval wide enough for all "
        f"{comparison.count} differences at once (Bonferroni), so that a difference may be "
        "undecided whose own interval leaves out 0.",
        floor,
        "FLOPs and time are those of an update, relative to the control's. At equal FLOPs or "
        "time, all rules have spent what the cheapest one's whole run spends; that loss is read "
        "off the same runs.",
        "A learning rate with * was not bracketed: the best one lies at the edge of what was "
        "tried.",
    ]


def table(comparison: Comparison, depth: int) -> list[Sequence[str]]:
    """A row for each rule at a depth, below HEAD."""
    head = [*HEAD]
    if comparison.target is not None:
        head += [f"updates to a training loss of {comparison.target:g}", "over the control's"]
    return [head, *(_row(comparison, cell) for cell in comparison.at(depth))]


def _row(comparison: Comparison, cell: Cell) -> Sequence[str]:
    control, difference = comparison.control_of(cell), comparison.difference(cell)
    low, high = min(cell.tuning), max(cell.tuning)
    if cell.rate is None:
        return [
            cell.rule,
            f"none of {low:g} to {high:g}",
            "diverged",
            *[""] * (6 + 2 * (comparison.target is not None)),
        ]
    diverged = sum(math.isinf(loss) for loss in cell.losses)
    row = [
        cell.rule,
        f"{cell.rate:g}{'' if cell.settled else '*'} ({low:g} to {high:g})",
        f"diverged in {diverged} of {len(cell.losses)}" if diverged else _shown(cell.final),
        "" if difference is None else _with_interval(difference.mean, difference.interval, 2),
        "control" if cell is control else difference.verdict if difference else "undecided",
        _ratio(cell.flops, control.flops),
        _ratio(cell.seconds, control.seconds),
        _number(comparison.equal(cell, "flops")),
        _number(comparison.equal(cell, "seconds")),
    ]
    if comparison.target is not None:
        reached = [value for value in cell.to_target if value is not None]
        whole = bool(reached) and len(reached) == len(cell.losses)
        seldom = f"in {len(reached)} of {len(cell.losses)} runs" if reached else "not reached"
        times = comparison.times(cell)
        row += [
            _shown(Estimate.of(reached)) if whole else seldom,
            f"{times[0].shown}, {times[1]}" if times else "",
        ]
    return row


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    text = _with_interval(estimate.mean, estimate.interval(CONFIDENCE))
    return f"{text}, n = {estimate.count}"


def _with_interval(mean: float, interval: tuple[float, float], digits: int = 4) -> str:
    texts = [number(value, digits) for value in (mean, *interval)]
    return texts[0] if math.isnan(interval[0]) else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.2f}x" if other and math.isfinite(one / other) else ""


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def markdown(comparison: Comparison) -> str:
    """The report as Markdown, with the plots beside it."""
    parts = [
        "# Residual rules, compared",
        f"`{comparison.command}`, on {comparison.cells[0].device}.",
        *(f"## {d} layers\n\n{markdown_table(table(comparison, d))}" for d in comparison.depths),
        *notes(comparison),
        *(f"![{text}]({name}.png)" for name, text in PLOTS.items()),
    ]
    return "\n\n".join(parts) + "\n"


def page(comparison: Comparison, folder: Path) -> str:
    """The report as HTML."""
    body = ["<h1>Residual rules, compared</h1>"]
    body.append(f"<p><code>{escape(comparison.command)}</code></p>")
    for depth in comparison.depths:
        head, *rows = table(comparison, depth)
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        lines = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
        )
        body.append(
            f'<h2>{depth} layers</h2><div class="scroll"><table><thead><tr>{cells}</tr></thead>'
            f"<tbody>{lines}</tbody></table></div>"
        )
    body += [f"<p>{escape(text)}</p>" for text in notes(comparison)]
    for name, text in PLOTS.items():
        picture = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
        body.append(
            f'<figure><img alt="{escape(text)}" src="data:image/svg+xml;base64,{picture}">'
            f"<figcaption>{escape(text)}</figcaption></figure>"
        )
    commands = "\n".join(command for cell in comparison.cells for command in cell.commands)
    body.append(f"<details><summary>Commands</summary><pre>{escape(commands)}</pre></details>")
    return document("Residual rules, compared", body)


def _panels(
    comparison: Comparison, title: str, draw: Callable[[Axes, Cell, str], None]
) -> tuple[Figure, list[Axes]]:
    """A panel for each depth, in which every rule is drawn in its colour."""
    figure, axes = drawing.captioned(title, comparison.command, len(comparison.depths))
    rules = drawing.colours(dict.fromkeys(cell.rule for cell in comparison.cells))
    for axis, depth in zip(axes, comparison.depths, strict=True):
        for cell in comparison.at(depth):
            draw(axis, cell, rules[cell.rule])
        axis.set_title(f"{depth} layers")
        axis.legend()
    return figure, axes


def plot_rates(comparison: Comparison) -> Figure:
    """The final test loss by learning rate; rates at which training diverged lie on top."""
    losses = [x for cell in comparison.cells for x in cell.tuning.values() if math.isfinite(x)]
    top = max(losses, default=1.0) * 1.05

    def draw(axis: Axes, cell: Cell, colour: str) -> None:
        finite = {rate: loss for rate, loss in cell.tuning.items() if math.isfinite(loss)}
        axis.plot(list(finite), list(finite.values()), "o-", color=colour, label=cell.rule, ms=4)
        broken = [rate for rate in cell.tuning if rate not in finite]
        axis.plot(broken, [top] * len(broken), "x", color=colour)

    figure, axes = _panels(comparison, "Where each rule trains, and where it breaks", draw)
    for axis, depth in zip(axes, comparison.depths, strict=True):
        axis.set(xlabel="learning rate", ylabel="final test loss (nats)", xscale="log")
        rates = sorted({rate for cell in comparison.at(depth) for rate in cell.tuning})
        shown = rates[:: -(-len(rates) // 7)]
        axis.set_xticks(shown, [f"{rate:g}" for rate in shown])
        axis.minorticks_off()
    return figure


def plot_curves(comparison: Comparison) -> Figure:
    """The training loss by update at each rule's best learning rate."""

    def draw(axis: Axes, cell: Cell, colour: str) -> None:
        if not cell.curves:
            return
        curves = [drawing.smoothed(Curve([*one.updates], one.losses)) for one in cell.curves]
        length = min(len(curve.x) for curve in curves)
        smooth = np.array([curve.y[:length] for curve in curves])
        updates, mean = curves[0].x[:length], smooth.mean(0)
        axis.plot(updates, mean, color=colour, label=f"{cell.rule}, {cell.rate:g}")
        if len(smooth) > 1:
            spread = smooth.std(0, ddof=1)
            axis.fill_between(updates, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)

    figure, axes = _panels(comparison, "Each rule at its own best learning rate", draw)
    for axis in axes:
        axis.set(xlabel="update", ylabel="training loss (nats)")
    return figure
