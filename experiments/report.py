"""One HTML file of all results, with nothing outside it: for a phone, a screen and paper."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

from experiments.jobs import Job
from experiments.published import SOURCES
from experiments.results import Claim, Results, Row, number
from experiments.summary import summary
from rezero_jax.runs.reader import Run
from rezero_jax.training.plan import duration


class Experiment(Protocol):
    """What each of the files of experiments holds."""

    @property
    def TITLE(self) -> str:
        """What it is."""

    @property
    def SOURCE(self) -> str:
        """Where it is in the paper."""

    @property
    def SEEDS(self) -> int:
        """Runs of each setting in the paper."""

    @property
    def SETTING(self) -> Mapping[str, str]:
        """By scale, what is run, in a sentence or two."""

    def runs(self, scale: str) -> list[Job]:
        """The runs it needs, without their seeds."""

    def measure(self, scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
        """The results, from the runs of each setting."""

    def plot(self, results: Results) -> Figure:
        """The plot of them."""

    def section(self, results: Results) -> list[str]:
        """Paragraphs of plain text that go with them."""


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; padding: 1rem;
  max-width: 54rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
p { max-width: 42rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; width: 100%; margin: 1rem 0;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.3rem 0.6rem 0.3rem 0; border-bottom: 1px solid #e4e4e4;
  vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.group th { padding-top: 0.9rem; border-bottom: 1px solid #888; }
td.reduced { color: #777; }
img { width: 100%; max-width: 46rem; height: auto; }
figure { margin: 1rem 0; }
pre { font-size: 0.75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
small, .setting { color: #555; }
.confirmed { color: #00603f; font-weight: 600; }
.denied { color: #a33200; font-weight: 600; }
.open { color: #555; font-weight: 600; }
a { color: #00528a; }
@media (max-width: 30rem) {
  body { font-size: 15px; padding: 0.7rem; }
  table { font-size: 0.75rem; table-layout: fixed; }
  th:first-child { width: 34%; }
  th, td { padding-right: 0.35rem; overflow-wrap: anywhere; }
  td.number, th.number { white-space: normal; }
}
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; }
  h2, figure, tbody, li { break-inside: avoid; }
  th, td { padding: 0.15rem 0.6rem 0.15rem 0; }
  img { max-width: 14cm; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  details { display: none; }
}
"""

Found = Sequence[tuple[str, Experiment, Results]]


def write_report(folder: Path, scale: str, experiments: Mapping[str, Experiment]) -> Path:
    """Writes report.html and summary.md of all results in a folder; returns the former."""
    found = [
        (name, experiment, Results.read(folder / f"{name}.json"))
        for name, experiment in experiments.items()
        if (folder / f"{name}.json").exists()
    ]
    (folder / "summary.md").write_text(summary(results for _, _, results in found) + "\n")
    path = folder / "report.html"
    path.write_text(page(folder, scale, found))
    return path


def page(folder: Path, scale: str, found: Found) -> str:
    """The report as HTML; the plots are read from `folder`."""
    body = [
        "<h1>ReZero is All You Need: our numbers and the paper's</h1>",
        f"<p>Scale <b>{escape(scale)}</b>. &dagger; marks what is smaller than in the paper: such "
        "numbers stand beside the paper's, but are not of the same experiment. &plusmn; is the "
        "standard error of the mean over runs. The paper's claims are held against the runs of "
        "this scale.</p>",
        _summary(found),
        *(_section(folder, *one) for one in found),
        _sources(found),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>ReZero, scale {escape(scale)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _summary(found: Found) -> str:
    """The headline numbers and the claims of all experiments."""
    bodies = []
    for name, experiment, results in found:
        verdicts = [_verdict(claim)[0] for claim in results.claims]
        count = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)))
        head = (
            f'<tr class="group"><th colspan="4"><a href="#{name}">{escape(experiment.TITLE)}</a>'
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
        for verdict, css in [_verdict(claim)]
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
            *(f"<p>{escape(text)}</p>" for text in experiment.section(results)),
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
        head = f'<tr class="group"><th colspan="4">{escape(quantity)}</th></tr>'
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
        theirs = escape(paper.text if paper.value is None else number(paper.value))
        theirs += f" &plusmn; {number(paper.error, 2)}" if paper.error is not None else ""
        of = f"{row.against}, " if row.against not in ("", row.setting) else ""
        theirs += f"<br><small>{escape(of + paper.source)}</small>"
    if gap is not None and paper is not None:
        relative = f" ({gap / abs(paper.value):+.0%})" if paper.value else ""
        difference = f"{'+' if gap >= 0 else ''}{number(gap, 3)}{relative}"
    reduced = " reduced" * row.reduced
    return (
        f'<tr><td>{escape(name)}</td><td class="number">{_ours(row)}</td>'
        f'<td class="number">{theirs}</td><td class="number{reduced}">{difference}</td></tr>'
    )


def _ours(row: Row) -> str:
    missing, dagger = row.ours.count(None), "&nbsp;&dagger;" * row.reduced
    if row.mean is None:
        some = f" in {missing} of {len(row.ours)}" if 0 < missing < len(row.ours) else ""
        return escape(row.missing + some) + dagger
    error = f" &plusmn; {number(row.error, 2)}" if row.error is not None else ""
    count = f"<br><small>{len(row.ours)} runs</small>" if len(row.ours) > 1 else ""
    return f"{number(row.mean)}{error}{dagger}{count}"


def _verdict(claim: Claim) -> tuple[str, str]:
    """The word for what was found of a claim, and its CSS class."""
    if claim.holds is None:
        return "not told", "open"
    return ("confirmed",) * 2 if claim.holds else ("denied",) * 2


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
