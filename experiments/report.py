"""Reports in Markdown: claims and numbers of the paper's experiments, and comparisons of rules."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from experiments import compare_plots, drawing
from experiments.comparison import Cell, Comparison
from experiments.jobs import DESCRIPTIONS
from experiments.published import SOURCES, STATUSES, WORDS
from experiments.results import Results
from experiments.statistics import LEVEL, NOT_SIGNIFICANT, between, fisher
from rezero_jax.analysis.theme import themed
from rezero_jax.formatting import duration, markdown, markdown_table, number

CLAIMS = ("claim", "status", "n", "95 % interval", "evidence", "from")
PLOTS = {
    "differences": "Final test loss minus the control's, in pairs of seeds: mean and 95 % interval "
    "of each difference alone. The grey band is the noise floor.",
    "rates": "Final test loss by learning rate, on the tuning seeds. A cross: training diverged, "
    "or the loss is above the panel.",
    "curves": "Training loss by update, mean and deviation over the seeds, smoothed.",
}


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


def commands_block(found: Sequence[Results]) -> str:
    """The command behind each experiment, with its device and time."""
    lines = []
    for results in found:
        if made := results.made:
            lines.append(f"# {results.experiment}: {made.device}, {duration(made.seconds)}")
            lines.append(_wrapped(made.command))
    return _shell(lines)


def _shell(lines: Sequence[str]) -> str:
    return "\n".join(("```sh", *lines, "```"))


def _wrapped(command: str) -> str:
    lines = textwrap.wrap(command, 92, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(lines)


def settings_table(results: Results) -> str:
    """Every number beside the paper's, a table for settings that share metrics; the remarks."""
    cells: dict[str, dict[str, str]] = {}
    for row in results.rows:
        paper = results.paper(row)
        shown = f"{row.shown}; paper {paper.shown}" if paper else row.shown
        setting = f"{row.setting} (a small stand-in)" if results.scale == "smoke" else row.setting
        cells.setdefault(setting, {})[row.metric] = shown
    tables: list[dict[str, dict[str, str]]] = []
    for setting, numbers in cells.items():
        shared = (table for table in tables for one in table.values() if one.keys() & numbers)
        if (table := next(shared, None)) is None:
            tables.append(table := {})
        table[setting] = numbers
    parts = []
    for table in tables:
        metrics = list(dict.fromkeys(name for one in table.values() for name in one))
        lines = [("", *map(markdown, metrics))]
        lines += [
            (markdown(name), *(one.get(m, "") for m in metrics)) for name, one in table.items()
        ]
        wide = len(metrics) > len(table)
        parts.append(markdown_table(zip(*lines, strict=True) if wide else lines))
    if results.remarks:
        parts.append("\n".join(f"- {text}" for text in results.remarks))
    return "\n\n".join(parts)


def write_report(folder: Path, scale: str) -> Path:
    """Writes report.md, on all results in a folder; returns its path."""
    paths = [folder / f"{name}.json" for name in DESCRIPTIONS]
    found = [Results.read(path) for path in paths if path.exists()]
    tables = (claims_table(found), commands_block(found))
    parts = [
        f"# ReZero is All You Need: our numbers and the paper's\n\nScale `{scale}`. Our means have "
        "a 95 % interval over runs (Student's); ± of the paper is the standard error. No number "
        "of the paper is shown beside a reduced one.",
        *(table for table in tables if table.count("\n") > 1),
    ]
    for results in found:
        about = DESCRIPTIONS[results.experiment]
        parts += [f"## {about.title}", f"{about.source}. {about.setting[scale]}"]
        parts += [f"![{about.title}]({results.experiment}.png)", *about.notes]
        parts.append(settings_table(results))
        if results.made and results.made.runs:
            parts.append(_shell(results.made.runs))
    sources = "\n".join(f"- {mark}: {text}" for mark, text in SOURCES.items())
    parts.append(f"## Sources of the paper's numbers\n\n{sources}")
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


# ---- Comparisons


def write_comparison(comparison: Comparison, folder: Path, *, svg: bool = True) -> Path:
    """Writes report.md and its plots; returns the former's path."""
    for name in plots_of(comparison):
        plot = themed(getattr(compare_plots, f"plot_{name}"))
        drawing.save(plot(comparison), folder, name, svg=svg)
    path = folder / "report.md"
    path.write_text(comparison_report(comparison, folder.name))
    return path


def plots_of(comparison: Comparison) -> list[str]:
    """The plots that show something: one rule has no differences, and one rate no curve."""
    needed = {"differences": len(comparison.rules) > 1, "rates": comparison.is_tuned}
    return [name for name in PLOTS if needed.get(name, True)]


def comparison_report(comparison: Comparison, name: str) -> str:
    """The report of the comparison of this name, with links to the plots beside it."""
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
        "and the verdict is that of Fisher's exact test on how many runs reach the target.",
        "A learning rate with * was not bracketed: it is at the edge of the rates tried."
        if comparison.is_tuned
        else "No learning rate was tuned: every rule has the config's.",
    ]
    parts = [f"# Comparison of residual rules: {name}"]
    parts += [_shell([_wrapped(made.command)]), f"On {made.device}."] if made else []
    parts += [
        f"## {title}\n\n{by_depth(comparison, shown)}"
        for title, shown in TABLES.items()
        if comparison.has_target or shown is not to_target
    ]
    parts += [*notes, *(f"![{PLOTS[name]}]({name}.png)" for name in plots_of(comparison))]
    return "\n\n".join(parts) + "\n"


def by_depth(comparison: Comparison, shown: Callable[[Comparison, Cell], str]) -> str:
    """A line for each rule and a column for each depth, in Markdown."""
    lines = [["rule", *(f"{depth} layers" for depth in comparison.depths)]]
    for rule in comparison.rules:
        lines.append([f"`{rule}`", *(shown(comparison, cell) for cell in comparison.of(rule))])
    return markdown_table(lines)


def loss_and_difference(comparison: Comparison, cell: Cell) -> str:
    """The final test loss of a cell, the difference from the control, and the verdict."""
    if cell.final is None or cell.final.mean is None:
        return cell.final.shown if cell.final else "diverged"
    difference = comparison.difference(cell)
    if difference is None:
        return number(cell.final.mean)
    mean, interval = difference.sample.mean, difference.sample.interval()
    if mean is None or interval is None:
        return f"{number(cell.final.mean)}: {difference.sample.shown}, {difference.verdict}"
    gap, low, high = (number(value, 2) for value in (mean, *interval))
    return f"{number(cell.final.mean)}: {gap} ({low} to {high}), {difference.verdict}"


def to_target(comparison: Comparison, cell: Cell) -> str:
    """Updates to the target, over the control's, and the verdict: by Fisher's p if censored."""
    row, ours = cell.to_target, comparison.control_of(cell).to_target
    if row is None:
        return ""
    censored = row.reached < len(row.draws)
    text = f"reached in {row.reached} of {len(row.draws)} runs" if row.reached else "not reached"
    text = text if censored else row.shown
    if (times := comparison.times(cell)) and ours:
        word, p = times.verdict, ""
        if censored:
            chance = fisher(row, ours)
            word = "reached less often" if chance < LEVEL / comparison.count else NOT_SIGNIFICANT
            p = f" (p = {number(chance, 2)})"
        text += f": {times.sample.shown}, {word}{p}"
    return text


def _rate(comparison: Comparison, cell: Cell) -> str:
    """The best learning rate, with a star if it was not bracketed, and the rates tried."""
    if not comparison.is_tuned:
        return f"{min(cell.tuning):g}"
    tried = f"{min(cell.tuning):g} to {max(cell.tuning):g}"
    if cell.final is None:
        return f"none of {tried}"
    return f"{cell.final.rate:g}{'' if cell.is_bracketed else '*'} ({tried})"


def _equal(comparison: Comparison, cell: Cell, what: str) -> str:
    loss = comparison.equal(cell, what)
    return "" if loss is None else number(loss)


def _costs(comparison: Comparison, cell: Cell) -> str:
    """FLOPs and time of an update over the control's; empty if unknown, that is 0 or not finite."""
    control = comparison.control_of(cell)
    pairs = ((getattr(cell, what), getattr(control, what)) for what in ("flops", "seconds"))
    ratios = [one / other if one and other else math.nan for one, other in pairs]
    return ", ".join(f"{ratio:.2f}x" for ratio in ratios if math.isfinite(ratio))


TABLES: Mapping[str, Callable[[Comparison, Cell], str]] = {
    "Final test loss, minus the control's": loss_and_difference,
    "Verdicts of Dunnett's test": lambda c, cell: c.dunnett[cell.depth].get(cell.rule, ""),
    "Updates to the target, over the control's": to_target,
    "Final test loss": lambda _, cell: cell.final.shown if cell.final else "diverged",
    "Best learning rate": _rate,
    "FLOPs and time of an update, over the control's": _costs,
    "Training loss at equal FLOPs": partial(_equal, what="flops"),
    "Training loss at equal time": partial(_equal, what="seconds"),
}


def comparison_summary(comparison: Comparison) -> str:
    """The final test loss at each depth, and the costs of an update of the deepest net."""
    lines = by_depth(comparison, loss_and_difference).splitlines()
    costs = [_costs(comparison, comparison.of(rule)[-1]) for rule in comparison.rules]
    ends = ["FLOPs and time", "---", *costs]
    return "\n".join(f"{line} {end} |" for line, end in zip(lines, ends, strict=True))
