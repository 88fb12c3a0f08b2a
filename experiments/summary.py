"""The headline numbers of all experiments as one Markdown table: ours, the paper's, how made."""

from collections.abc import Iterable

from experiments.results import Results, Row, number
from rezero_jax.analysis.table import markdown
from rezero_jax.training.plan import duration

HEAD = ("", "ours", "paper", "scale", "runs", "device", "time", "command")


def summary(found: Iterable[Results]) -> str:
    """The table. "time" is that of everything the command does, its runs one after another."""
    lines = [HEAD]
    for results in found:
        made = results.made
        how = (made.device, duration(made.seconds), f"`{made.command}`") if made else ("",) * 3
        for row in results.rows:
            if row.headline:
                scale = f"{results.scale}, reduced" if row.reduced else "the paper's"
                numbers = (f"{row.setting}, {row.quantity}", _ours(row), _paper(results, row))
                lines.append((*numbers, scale, str(len(row.ours)), *how))
    return markdown(lines)


def _ours(row: Row) -> str:
    if row.mean is None:
        return row.missing
    return number(row.mean) + (f" ± {number(row.error, 2)}" if row.error is not None else "")


def _paper(results: Results, row: Row) -> str:
    paper = results.paper(row)
    if paper is None:
        return "not given"
    value = paper.text if paper.value is None else number(paper.value)
    error = f" ± {number(paper.error, 2)}" if paper.error is not None else ""
    return value + error + (f" ({row.against})" if row.against not in ("", row.setting) else "")
