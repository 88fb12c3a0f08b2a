"""Reports in Markdown: claims and numbers of the paper's experiments, and comparisons of rules."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments import compare_plots, drawing
from experiments.claims import STATUSES, WORDS
from experiments.comparison import Cell, Comparison
from experiments.experiment import DESCRIPTIONS
from experiments.published import SOURCES
from experiments.results import Results
from experiments.statistics import LEVEL, Draws, between, fisher
from rezero_jax.analysis.plots.theme import themed
from rezero_jax.formatting import duration, markdown_table, number

CLAIMS = ("claim", "status", "n", "95 % interval", "evidence", "from")
FULL = ("in the paper's setting", "ours (95 % interval)", "paper", "n", "from")
REDUCED = ("reduced", "ours (95 % interval)", "n", "from")
PLOTS = {
    "differences": "Final test loss minus the control's, in pairs of seeds: mean and 95 % interval "
    "of each difference alone. The grey band is the noise floor.",
    "rates": "Final test loss by learning rate, on the tuning seeds. A cross: training diverged, "
    "or the loss is above the panel.",
    "curves": "Training loss by update, mean and deviation over the seeds, smoothed.",
}
COSTS = ("flops", "seconds")  # of a cell


# ---- The paper's experiments


def claims_table(found: Sequence[Results]) -> str:
    """Every claim with its evidence, by status."""
    lines = []
    for results in found:
        for claim in results.claims:
            interval = between(claim.interval) if claim.interval else "none"
            evidence = claim.evidence
            if claim.reduced and not evidence.startswith(WORDS[claim.holds]):
                evidence = f"{WORDS[claim.holds]} in this setting; {evidence}"
            what = (claim.text, claim.status, f"{claim.n:,}", interval, evidence)
            lines.append((*what, f"`{results.experiment}`"))
    return markdown_table([CLAIMS, *sorted(lines, key=lambda line: STATUSES.index(line[1]))])


def number_tables(found: Sequence[Results]) -> tuple[str, str]:
    """The headline numbers in the paper's setting, beside the paper's, and the reduced ones."""
    full, reduced = [FULL], [REDUCED]
    for results in found:
        for row in (row for row in results.rows if row.headline):
            name, n = f"{row.setting}, {row.metric}", f"{len(row.draws):,}"
            if row.reduced:
                reduced.append((name, row.shown, n, f"`{results.experiment}`"))
            else:
                paper = results.paper(row)
                theirs = paper.shown if paper else "not given"
                full.append((name, row.shown, theirs, n, f"`{results.experiment}`"))
    return markdown_table(full), markdown_table(reduced)


def commands_table(found: Sequence[Results]) -> str:
    """The command, device and time behind each experiment."""
    lines = [("", "command", "device", "time")]
    for results in found:
        if made := results.made:
            name, command = f"`{results.experiment}`", f"`{made.command}`"
            lines.append((name, command, made.device, duration(made.seconds)))
    return markdown_table(lines)


def settings_table(results: Results) -> str:
    """Every number of an experiment by setting and metric, beside the paper's, and its remarks.

    Settings that have a metric in common share a table, whose longer side is the vertical one.
    """
    cells: dict[str, dict[str, str]] = {}
    for row in results.rows:
        paper = results.paper(row)
        shown = f"{row.shown}; paper {paper.shown}" if paper else row.shown
        cells.setdefault(row.setting, {})[row.metric] = shown
    tables: list[dict[str, dict[str, str]]] = []
    for setting, numbers in cells.items():
        shared = (table for table in tables for one in table.values() if one.keys() & numbers)
        if (table := next(shared, None)) is None:
            tables.append(table := {})
        table[setting] = numbers
    parts = [_crossed(table) for table in tables]
    if results.remarks:
        parts.append("\n".join(f"- {text}" for text in results.remarks))
    return "\n\n".join(parts)


def _crossed(numbers: Mapping[str, Mapping[str, str]]) -> str:
    """A table of texts by setting and metric."""
    metrics = list(dict.fromkeys(name for one in numbers.values() for name in one))
    lines = [(name, *(one.get(m, "") for m in metrics)) for name, one in numbers.items()]
    table = [("", *metrics), *lines]
    return markdown_table(zip(*table, strict=True) if len(metrics) > len(numbers) else table)


def write_report(folder: Path, scale: str) -> Path:
    """Writes report.md, on all results in a folder; returns its path."""
    found = {
        name: Results.read(path)
        for name in DESCRIPTIONS
        if (path := folder / f"{name}.json").exists()
    }
    every = list(found.values())
    tables = (claims_table(every), *number_tables(every), commands_table(every))
    parts = [
        f"# ReZero is All You Need: our numbers and the paper's\n\nScale `{scale}`. Our means have "
        "a 95 % interval over runs (Student's); ± of the paper is the standard error. No number "
        "of the paper is shown beside a reduced one.",
        *(table for table in tables if table.count("\n") > 1),
        *(_section(results) for results in every),
        "## Sources of the paper's numbers\n\n"
        + "\n".join(f"- {mark}: {text}" for mark, text in SOURCES.items()),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _section(results: Results) -> str:
    title, source, _, setting, notes = DESCRIPTIONS[results.experiment]
    parts = [f"## {title}", f"{source}. {setting[results.scale]}"]
    parts += [f"![{title}]({results.experiment}.png)", *notes, settings_table(results)]
    if results.made and results.made.runs:
        parts.append("```sh\n" + "\n".join(results.made.runs) + "\n```")
    return "\n\n".join(parts)


# ---- Comparisons


def write_comparison(comparison: Comparison, folder: Path, *, svg: bool = True) -> Path:
    """Writes report.md and its plots; returns the former's path."""
    for name in PLOTS:
        plot = themed(getattr(compare_plots, f"plot_{name}"))
        drawing.save(plot(comparison), folder, name, svg=svg)
    path = folder / "report.md"
    path.write_text(comparison_report(comparison))
    return path


def comparison_report(comparison: Comparison) -> str:
    """The report of a comparison, with links to the plots beside it."""
    made, noise = comparison.results.made, comparison.noise
    notes = [
        f"{1 - LEVEL:.0%} intervals are Student's: of the mean, and of the mean difference of "
        "pairs of runs with the same seed. A verdict takes an interval wide enough for all "
        f"{comparison.count} differences at once (Bonferroni), so that a difference may be not "
        "significant although its own interval excludes 0. Dunnett's test compares the rules of "
        "one depth with the control on the logarithm of the loss, with a pooled variance.",
        f"Between seeds the final loss deviates by {number(noise, 2)} nats, the median over rules "
        "and depths: the noise floor."
        if noise
        else "Without several seeds there is no noise floor, and no difference is significant.",
        "FLOPs and time are per update, relative to the control's. At equal FLOPs or time, all "
        "rules have spent what the cheapest one's whole run costs; that loss is read off the same "
        "runs. A run that does not reach the target is right-censored: the ratio is a lower bound, "
        "and p is that of Fisher's exact test on the number of runs that reach the target.",
        "A learning rate with * was not bracketed: it is at the edge of the rates tried.",
    ]
    parts = [
        "# Comparison of residual rules",
        *([f"`{made.command}`", f"On {made.device}."] if made else []),
        *(f"## {d} layers\n\n{markdown_table(_table(comparison, d))}" for d in comparison.depths),
        *notes,
        *(f"![{text}]({name}.png)" for name, text in PLOTS.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _table(comparison: Comparison, depth: int) -> list[Sequence[str]]:
    """A row for each rule at a depth, below a head."""
    head = ["rule", "best learning rate", "final test loss", "minus the control's", "verdict"]
    head += ["Dunnett's test", "FLOPs", "time", "training loss at equal FLOPs", "at equal time"]
    if comparison.target:
        head += [comparison.target, "over the control's"]
    dunnett = comparison.many_against_one(depth)
    return [head, *(_row(comparison, cell, dunnett, len(head)) for cell in comparison.at(depth))]


def _row(
    comparison: Comparison, cell: Cell, dunnett: Mapping[str, str], columns: int
) -> Sequence[str]:
    control, difference = comparison.control_of(cell), comparison.difference(cell)
    low, high = min(cell.tuning), max(cell.tuning)
    if cell.final is None:
        return [cell.rule, f"none of {low:g} to {high:g}", "diverged", *[""] * (columns - 3)]
    missing = "control" if cell is control else "not significant"
    row = [
        cell.rule,
        f"{cell.final.rate:g}{'' if cell.is_bracketed else '*'} ({low:g} to {high:g})",
        cell.final.shown,
        _rounded(difference.sample) if difference else "",
        difference.verdict if difference else missing,
        dunnett.get(cell.rule, ""),
        *(_ratio(getattr(cell, cost), getattr(control, cost)) for cost in COSTS),
        *(number(x) if (x := comparison.equal(cell, cost)) is not None else "" for cost in COSTS),
    ]
    if comparison.target:
        row += [_to_target(cell), _times(comparison, cell)]
    return row


def comparison_summary(comparison: Comparison) -> str:
    """A line for each rule: final test loss at each depth, minus the control's, the verdict.

    FLOPs and time are those of an update of the deepest net.
    """
    head, *rows = _by_depth(comparison, loss_and_difference)
    for rule, row in zip(comparison.rules, rows, strict=True):
        deepest = comparison.of(rule)[-1]
        control = comparison.control_of(deepest)
        row += [_ratio(getattr(deepest, cost), getattr(control, cost)) for cost in COSTS]
    return markdown_table([[*head, "FLOPs", "time"], *rows])


def target_table(comparison: Comparison) -> str:
    """A line for each rule: updates to the target at each depth, over the control's, verdict."""
    return markdown_table(_by_depth(comparison, _both))


def _by_depth(comparison: Comparison, shown: Callable[[Comparison, Cell], str]) -> list[list[str]]:
    """A row for each rule and a column for each depth, below a head."""
    head = ["rule", *(f"{depth} layers" for depth in comparison.depths)]
    return [
        head,
        *([f"`{r}`", *(shown(comparison, c) for c in comparison.of(r))] for r in comparison.rules),
    ]


def loss_and_difference(comparison: Comparison, cell: Cell) -> str:
    """The final test loss of a cell, the difference from the control, and the verdict."""
    if cell.final is None or cell.final.mean is None:
        return "diverged"
    difference = comparison.difference(cell)
    if difference is None:
        return number(cell.final.mean)
    return f"{number(cell.final.mean)}: {_rounded(difference.sample)}, {difference.verdict}"


def _both(comparison: Comparison, cell: Cell) -> str:
    return ": ".join(filter(None, (_to_target(cell), _times(comparison, cell))))


def _to_target(cell: Cell) -> str:
    """The updates of a cell to the target, or how many runs reach it."""
    row = cell.to_target
    if row is None:
        return ""
    if row.reached == len(row.draws):
        return row.shown
    return f"reached in {row.reached} of {len(row.draws)} runs" if row.reached else "not reached"


def _times(comparison: Comparison, cell: Cell) -> str:
    """The updates over the control's, with a verdict; Fisher's test where runs are censored."""
    times, ours = comparison.times(cell), comparison.control_of(cell).to_target
    if times is None or cell.to_target is None or ours is None:
        return ""
    text = f"{times.sample.shown}, {times.verdict}"
    censored = cell.to_target.reached < len(cell.to_target.draws)
    return f"{text}, p = {number(fisher(cell.to_target, ours), 2)}" if censored else text


def _rounded(sample: Draws) -> str:
    """A mean with two digits, and its interval."""
    interval = sample.interval()
    if sample.mean is None or interval is None:
        return sample.shown
    low, high = (number(end, 2) for end in interval)
    return f"{number(sample.mean, 2)} ({low} to {high})"


def _ratio(one: float, other: float) -> str:
    """The ratio of two costs; empty if one is unknown, that is 0 or not finite."""
    return f"{one / other:.2f}x" if one and other and math.isfinite(one / other) else ""
