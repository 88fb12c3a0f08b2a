"""The report of a comparison: a page that refers to no other file, and the same in Markdown."""

import base64
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from experiments import compare_plots, drawing
from experiments.comparison import CONFIDENCE, Cell, Comparison
from experiments.report import document
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
COSTS = ("flops", "seconds")  # of a cell
PLOTS = {
    "differences": "Final test loss less the control's, in pairs of seeds: mean and 95 % interval "
    "of each difference alone. The grey band is the noise floor.",
    "rates": "Final test loss by learning rate, on the tuning seeds. A cross: training diverged, "
    "or the loss lies above the panel.",
    "curves": "Training loss by update, mean and deviation over the seeds, smoothed.",
}


def write(comparison: Comparison, folder: Path) -> Path:
    """Writes report.html, report.md and the plots; returns the first."""
    write_markdown(comparison, folder)
    path = folder / "report.html"
    path.write_text(page(comparison, folder))
    return path


def write_markdown(comparison: Comparison, folder: Path) -> Path:
    """Writes report.md and its plots; returns the first."""
    for name in PLOTS:
        plot = themed(getattr(compare_plots, f"plot_{name}"))
        drawing.save(plot(comparison), folder, name)
    path = folder / "report.md"
    path.write_text(markdown(comparison))
    return path


def notes(comparison: Comparison) -> list[str]:
    """How to read the numbers."""
    noise = comparison.noise
    floor = (
        f"Between seeds the final loss deviates by {number(noise, 2)} nats, the median over rules "
        "and depths: the noise floor."
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


def summary(comparison: Comparison) -> str:
    """A line for each rule: its final test loss at each depth, less the control's, the verdict.

    In Markdown; operations and time are those of an update of the deepest net.
    """
    head, *rows = _by_depth(comparison, in_short)
    for rule, row in zip(comparison.rules, rows, strict=True):
        deepest = comparison.of(rule)[-1]
        control = comparison.control_of(deepest)
        row += [_ratio(getattr(deepest, cost), getattr(control, cost)) for cost in COSTS]
    return markdown_table([[*head, "FLOPs", "time"], *rows])


def race(comparison: Comparison) -> str:
    """A line for each rule: updates to the target at each depth, over the control's, the verdict.

    In Markdown; for a comparison that has a target.
    """
    return markdown_table(_by_depth(comparison, _raced))


def _by_depth(comparison: Comparison, shown: Callable[[Comparison, Cell], str]) -> list[list[str]]:
    """A row for each rule, and a column for each depth."""
    head = ["rule", *(f"{depth} layers" for depth in comparison.depths)]
    return [
        head,
        *([f"`{r}`", *(shown(comparison, c) for c in comparison.of(r))] for r in comparison.rules),
    ]


def in_short(comparison: Comparison, cell: Cell) -> str:
    """The final test loss of a cell, the difference to the control, and the verdict."""
    if cell.final is None:
        return "diverged"
    difference = comparison.difference(cell)
    if difference is None:
        return number(cell.final.mean)
    shown = _with_interval(difference.mean, difference.interval, 2)
    return f"{number(cell.final.mean)}: {shown}, {difference.verdict}"


def _raced(comparison: Comparison, cell: Cell) -> str:
    """The updates of a cell to the target, those over the control's, and the verdict."""
    return ": ".join(filter(None, (_reached(cell), _times(comparison, cell))))


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
        row += [_reached(cell), _times(comparison, cell)]
    return row


def _reached(cell: Cell) -> str:
    """The updates to the target."""
    reached = [value for value in cell.to_target if value is not None]
    if reached and len(reached) == len(cell.losses):
        return _shown(Estimate.of(reached))
    return f"in {len(reached)} of {len(cell.losses)} runs" if reached else "not reached"


def _times(comparison: Comparison, cell: Cell) -> str:
    """The same over the control's, with a verdict."""
    times = comparison.times(cell)
    return f"{times[0].shown}, {times[1]}" if times else ""


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    text = _with_interval(estimate.mean, estimate.interval(CONFIDENCE))
    return f"{text}, n = {estimate.count}"


def _with_interval(mean: float, interval: tuple[float, float], digits: int = 4) -> str:
    texts = [number(value, digits) for value in (mean, *interval)]
    return texts[0] if math.isnan(interval[0]) else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _ratio(one: float, other: float) -> str:
    """Of two costs; one that is 0 or not finite is unknown."""
    return f"{one / other:.2f}x" if one and other and math.isfinite(one / other) else ""


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def markdown(comparison: Comparison) -> str:
    """The report as Markdown, with the plots beside it."""
    parts = [
        "# Residual rules, compared",
        f"`{comparison.command}`",
        f"On {comparison.cells[0].device}.",
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
