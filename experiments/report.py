"""The reports of all results: an HTML file that refers to no other, and a Markdown table."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from experiments.claims import STATUSES
from experiments.experiment import Experiment
from experiments.published import SOURCES
from experiments.ratios import between
from experiments.results import Results, Row
from rezero_jax.formatting import duration, markdown_table

CSS = Path(__file__).with_name("report.css")
# Of summary.md, the report's three summaries.
CLAIMS = ("claim", "status", "n", "95 % interval", "evidence", "command", "time")
FULL = ("in the paper's setting", "ours (95 % interval)", "paper", "n", "device", "time", "command")
REDUCED = ("reduced", "ours (95 % interval)", "n", "device", "time", "command")

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
    """The claims, the headline numbers at full size, and reduced ones, as Markdown tables."""
    tables = (claims_table(found), *number_tables(found))
    return "\n\n".join(table for table in tables if table.count("\n") > 1)


def claims_table(found: Sequence[Results]) -> str:
    """Every claim with its evidence, decided ones first.

    "time" is that of the whole command, one job after another. Where no interval is needed, the
    result is exact or the same in every draw.
    """
    lines = []
    for results in found:
        for claim in results.claims:
            decided = claim.status in ("replicated", "contradicted")
            interval = "none needed" if decided else "none"
            if claim.interval:
                interval = between(claim.interval)
            what = (claim.text, claim.status, f"{claim.n:,}", interval, claim.evidence)
            lines.append((*what, *_how(results)[1:]))
    return markdown_table([CLAIMS, *sorted(lines, key=lambda line: STATUSES.index(line[1]))])


def number_tables(found: Sequence[Results]) -> tuple[str, str]:
    """The headline numbers in the paper's setting, beside the paper's, and the reduced ones."""
    full, reduced = [FULL], [REDUCED]
    for results in found:
        device, command, time = _how(results)
        for row in (row for row in results.rows if row.headline):
            name, n = f"{row.setting}, {row.quantity}", f"{len(row.ours):,}"
            if row.reduced:
                reduced.append((name, row.shown, n, device, time, command))
            else:
                paper = results.paper(row)
                theirs = paper.shown if paper else "not given"
                full.append((name, row.shown, theirs, n, device, time, command))
    return markdown_table(full), markdown_table(reduced)


def _how(results: Results) -> tuple[str, str, str]:
    """The device, the command and the time behind results."""
    if (made := results.made) is None:
        return "", "", ""
    return made.device, f"`{made.command}`", duration(made.seconds)


def page(folder: Path, scale: str, found: Found) -> str:
    """The report as HTML; the plots are read from `folder`."""
    body = [
        "<h1>ReZero is All You Need: our numbers and the paper's</h1>",
        f"<p>Scale <b>{escape(scale)}</b>. What stands in parentheses after a mean of ours is its "
        "95 % interval over runs (Student's); ± of the paper is the standard error. A claim is "
        "replicated or contradicted by an interval in the paper's setting, consistent if there are "
        "fewer runs than in the paper, and undecided if the interval is open or the setting "
        "reduced. No number of the paper stands beside a reduced one.</p>",
        _claims(found),
        _summary(found),
        *(_section(folder, *one) for one in found),
        _sources(found),
    ]
    return document(f"ReZero, scale {scale}", body)


def document(title: str, body: Sequence[str]) -> str:
    """A whole HTML file in the style of all reports."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>"
        f"{CSS.read_text()}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _claims(found: Found) -> str:
    """Every claim with its status, n, interval and command."""
    rows = []
    for name, _, results in found:
        command = f"<code>{escape(results.made.command)}</code>" if results.made else ""
        for claim in results.claims:
            interval = between(claim.interval) if claim.interval else "none"
            rows.append(
                f'<tr><td><a href="#{name}">{escape(claim.text)}</a></td>'
                f'<td><span class="{claim.status}">{claim.status}</span></td>'
                f'<td class="number">{claim.n}</td><td class="number">{interval}</td>'
                f"<td>{command}</td></tr>"
            )
    head = "".join(f"<th>{escape(text)}</th>" for text in (*CLAIMS[:4], CLAIMS[-1]))
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _summary(found: Found) -> str:
    """The headline numbers of all experiments, full size and reduced."""
    kinds: dict[bool, list[str]] = {False: [], True: []}
    for name, experiment, results in found:
        for reduced, bodies in kinds.items():
            rows = [
                _cells(f"{row.setting}, {row.quantity}", row, results)
                for row in results.rows
                if row.headline and row.reduced == reduced
            ]
            head = (
                f'<tr class="head"><th colspan="{3 - reduced}"><a href="#{name}">'
                f"{escape(experiment.TITLE)}</a></th></tr>"
            )
            bodies += [f"<tbody>{head}{''.join(rows)}</tbody>"] if rows else []
    return _two_tables(kinds)


def _section(folder: Path, name: str, experiment: Experiment, results: Results) -> str:
    picture = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
    claims = "".join(
        f'<li><span class="{claim.status}">{claim.status}</span>: {escape(claim.text)} '
        f"<small>[{escape(claim.source)}]</small>: {escape(claim.evidence)} (n = {claim.n}"
        f"{f', 95 % interval {between(claim.interval)}' if claim.interval else ''}).</li>"
        for claim in results.claims
    )
    made, commands = "", ""
    if results.made:
        device, _, time = _how(results)
        made = escape(f" Made on {device}, in {time}.")
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
            *(f"<p>{escape(text)}</p>" for text in (*experiment.NOTES, *results.remarks)),
            _rows(results),
            f"<details><summary>Commands</summary><pre>{commands}</pre></details>"
            if commands
            else "",
            "</section>",
        )
    )


def _rows(results: Results) -> str:
    """All rows, full size and reduced, those of a quantity together."""
    kinds: dict[bool, list[str]] = {False: [], True: []}
    for reduced, bodies in kinds.items():
        chosen = [row for row in results.rows if row.reduced == reduced]
        for quantity in dict.fromkeys(row.quantity for row in chosen):
            head = f'<tr class="head"><th colspan="{3 - reduced}">{escape(quantity)}</th></tr>'
            rows = [_cells(row.setting, row, results) for row in chosen if row.quantity == quantity]
            bodies.append(f"<tbody>{head}{''.join(rows)}</tbody>")
    return _two_tables(kinds)


def _two_tables(kinds: Mapping[bool, Sequence[str]]) -> str:
    """A table of what is full size, beside the paper, and one of what is reduced (True)."""
    tables = []
    for reduced, bodies in kinds.items():
        title = "Reduced: smaller than in the paper" if reduced else "In the paper's setting"
        paper = "" if reduced else '<th class="number">paper</th>'
        if bodies:
            tables.append(
                f'<div class="scroll"><table><thead><tr><th>{title}</th>'
                f'<th class="number">ours</th>{paper}</tr></thead>{"".join(bodies)}</table></div>'
            )
    return "\n".join(tables)


def _cells(name: str, row: Row, results: Results) -> str:
    """A row of a table, under a name."""
    paper, count = results.paper(row), len(row.ours)
    ours = escape(row.shown)
    if row.mean is not None and count > 1:
        ours += f"<br><small>{count} runs</small>"
    theirs = ""
    if not row.reduced:
        text = f"{escape(paper.shown)}<br><small>{escape(paper.source)}</small>" if paper else ""
        theirs = f'<td class="number">{text}</td>'
    return f'<tr><td>{escape(name)}</td><td class="number">{ours}</td>{theirs}</tr>'


def _sources(found: Found) -> str:
    used = {
        mark
        for _, _, results in found
        for row in results.rows
        if (paper := results.paper(row))
        for mark in paper.source.split()
    } | {claim.source.split()[0] for _, _, results in found for claim in results.claims}
    items = "".join(
        f"<dt><b>{mark}</b></dt><dd>{escape(text)}</dd>"
        for mark, text in SOURCES.items()
        if mark in used
    )
    return f"<h2>Where the paper's numbers are from</h2><dl>{items}</dl>"
