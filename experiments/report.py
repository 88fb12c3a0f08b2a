"""The reports of all results: an HTML file that refers to no other, and a Markdown table."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from experiments.experiment import Experiment
from experiments.published import SOURCES
from experiments.results import Results, Row
from rezero_jax.formatting import duration, markdown_table, number

CSS = Path(__file__).with_name("report.css")
HEAD = ("", "ours", "paper", "scale", "runs", "device", "time", "command")  # of summary.md
# Whether a claim holds: in a word, and as a CSS class.
VERDICTS = {True: ("confirmed",) * 2, False: ("denied",) * 2, None: ("undecided", "open")}

Found = Sequence[tuple[str, Experiment, Results]]


def write_report(folder: Path, scale: str, experiments: Mapping[str, Experiment]) -> Path:
    """Writes report.html and summary.md of all results in a folder; returns the former."""
    found = [
        (name, experiment, Results.read(folder / f"{name}.json"))
        for name, experiment in experiments.items()
        if (folder / f"{name}.json").exists()
    ]
    (folder / "summary.md").write_text(summary([results for _, _, results in found]) + "\n")
    path = folder / "report.html"
    path.write_text(page(folder, scale, found))
    return path


def summary(found: Sequence[Results]) -> str:
    """The headline numbers as a Markdown table. "time" is that of the whole command, one job."""
    lines = [HEAD]
    for results in found:
        made = results.made
        how = (made.device, duration(made.seconds), f"`{made.command}`") if made else ("",) * 3
        for row in results.rows:
            if row.headline:
                scale = f"{results.scale}, reduced" if row.reduced else "the paper's"
                paper = results.paper(row)
                theirs = paper.shown if paper else "not given"
                if paper and row.against not in ("", row.setting):
                    theirs += f" ({row.against})"
                name = f"{row.setting}, {row.quantity}"
                lines.append((name, row.shown, theirs, scale, str(len(row.ours)), *how))
    return markdown_table(lines)


def page(folder: Path, scale: str, found: Found) -> str:
    """The report as HTML; the plots are read from `folder`."""
    body = [
        "<h1>ReZero is All You Need: our numbers and the paper's</h1>",
        f"<p>Scale <b>{escape(scale)}</b>. &dagger; marks what is smaller than in the paper: such "
        "numbers stand beside the paper's, but are not of the same experiment. ± is the "
        "standard error of the mean over runs. The paper's claims are held against the runs of "
        "this scale.</p>",
        _summary(found),
        *(_section(folder, *one) for one in found),
        _sources(found),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>ReZero, scale {escape(scale)}</title>\n<style>"
        f"{CSS.read_text()}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _summary(found: Found) -> str:
    """The headline numbers and the claims of all experiments."""
    bodies = []
    for name, experiment, results in found:
        verdicts = [VERDICTS[claim.holds][0] for claim in results.claims]
        count = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)))
        head = (
            f'<tr class="head"><th colspan="4"><a href="#{name}">{escape(experiment.TITLE)}</a>'
            f"{f' <small>claims: {count}</small>' if count else ''}</th></tr>"
        )
        rows = [
            _cells(f"{row.setting}, {row.quantity}", row, results)
            for row in results.rows
            if row.headline
        ]
        bodies.append(f"<tbody>{head}{''.join(rows)}</tbody>")
    return _table("number", bodies)


def _section(folder: Path, name: str, experiment: Experiment, results: Results) -> str:
    picture = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
    claims = "".join(
        f'<li><span class="{css}">{verdict}</span>: {escape(claim.text)} '
        f"<small>[{escape(claim.source)}]</small>: {escape(claim.evidence)}.</li>"
        for claim in results.claims
        for verdict, css in [VERDICTS[claim.holds]]
    )
    made, commands = "", ""
    if results.made:
        made = escape(f" Made on {results.made.device}, in {duration(results.made.seconds)}.")
        commands = escape("\n".join((results.made.command, *results.made.runs)))
    return "\n".join(
        (
            f'<section id="{name}">',
            f"<h2>{escape(experiment.TITLE)}</h2>",
            f'<p class="setting">{escape(experiment.SOURCE)}. Scale {escape(results.scale)}: '
            f"{escape(experiment.SETTING[results.scale])}{made}</p>",
            f'<figure><img alt="{escape(experiment.TITLE)}, plotted" '
            f'src="data:image/svg+xml;base64,{picture}"></figure>',
            f"<ul>{claims}</ul>" if claims else "",
            *(f"<p>{escape(text)}</p>" for text in experiment.NOTES),
            _rows(results),
            f"<details><summary>Commands</summary><pre>{commands}</pre></details>"
            if commands
            else "",
            "</section>",
        )
    )


def _rows(results: Results) -> str:
    """All rows, those of a quantity together."""
    bodies = []
    for quantity in dict.fromkeys(row.quantity for row in results.rows):
        head = f'<tr class="head"><th colspan="4">{escape(quantity)}</th></tr>'
        rows = [_cells(r.setting, r, results) for r in results.rows if r.quantity == quantity]
        bodies.append(f"<tbody>{head}{''.join(rows)}</tbody>")
    return _table("setting", bodies)


def _table(first: str, bodies: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><table><thead><tr><th>{first}</th><th class="number">ours</th>'
        '<th class="number">paper</th><th class="number">difference</th></tr></thead>'
        f"{''.join(bodies)}</table></div>"
    )


def _cells(name: str, row: Row, results: Results) -> str:
    """A row of a table, under a name."""
    paper, gap = results.paper(row), results.difference(row)
    theirs = difference = ""
    if paper is not None:
        of = f"{row.against}, " if row.against not in ("", row.setting) else ""
        theirs = f"{escape(paper.shown)}<br><small>{escape(of + paper.source)}</small>"
    if gap is not None and paper is not None:
        relative = f" ({gap / abs(paper.value):+.0%})" if paper.value else ""
        difference = f"{'+' if gap >= 0 else ''}{number(gap, 3)}{relative}"
    count = len(row.ours)
    ours = escape(row.shown) + "&nbsp;&dagger;" * row.reduced
    if row.mean is not None and count > 1:
        ours += f"<br><small>{count} runs</small>"
    elif 0 < (missing := row.ours.count(None)) < count:
        ours += f"<br><small>in {missing} of {count}</small>"
    return (
        f'<tr><td>{escape(name)}</td><td class="number">{ours}</td>'
        f'<td class="number">{theirs}</td>'
        f'<td class="number{" reduced" * row.reduced}">{difference}</td></tr>'
    )


def _sources(found: Found) -> str:
    used = {
        paper.source.split()[0]
        for _, _, results in found
        for row in results.rows
        if (paper := results.paper(row))
    } | {claim.source.split()[0] for _, _, results in found for claim in results.claims}
    items = "".join(
        f"<dt><b>{mark}</b></dt><dd>{escape(text)}</dd>"
        for mark, text in SOURCES.items()
        if mark in used
    )
    return f"<h2>Where the paper's numbers are from</h2><dl>{items}</dl>"
