"""Writes the generated tables of README.md and the documentation.

    python -m experiments results

The tables come from the results in docs/paper and docs/comparisons, and from the residual rules. A
table is between <!-- NAME --> and <!-- end -->; all else in the pages is written by hand.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import NamedTuple

from experiments import drawing, report, rules_table
from experiments.claims import Claim, bounded
from experiments.comparison import NO_LAYERS, Cell, Comparison
from experiments.jobs import ROOT
from experiments.results import Results, Row
from experiments.statistics import NOT_SIGNIFICANT, Sample, paired, quotients, together
from rezero_jax.analysis.theme import themed
from rezero_jax.errors import UserError
from rezero_jax.formatting import markdown_table, number

FOLDER = ROOT / "docs" / "paper"
COMPARISONS = ROOT / "docs" / "comparisons"  # written by `python -m experiments compare`
PAGES = ("README.md", "docs/results.md", "docs/schemes.md")
COSTS = FOLDER / "v5e-8.json"  # written by experiments.accelerator
CLAIMS = tomllib.loads((COMPARISONS / "claims.toml").read_text())


class Within(NamedTuple):
    """A claim on the rules of one comparison, and the verdict that it needs on each baseline."""

    comparison: str
    claim: str
    source: str
    needs: str


class Pair(NamedTuple):
    """A rule of one comparison minus a rule of another, in pairs of seeds.

    Attributes:
      one, other: the comparison and the rule.
      claim: that the one ends with fewer bits; "" if nothing is claimed.
    """

    one: tuple[str, str]
    other: tuple[str, str]
    claim: str = ""


FOREMOST: Mapping[str, str] = CLAIMS["foremost"]  # experiment -> the beginning of a claim
WITHIN = [Within(**fields) for fields in CLAIMS["within"]]
ACROSS = [
    Pair(tuple(fields["one"]), tuple(fields["other"]), fields.get("claim", ""))
    for fields in CLAIMS["across"]
]


def main(argv: Sequence[str]) -> int:
    """Writes all pages, the reports of comparisons and all plots; returns the exit status.

    Raises:
      UserError: there are arguments, or a page has no place for a table.
    """
    if argv:
        raise UserError(f"`python -m experiments results` takes no arguments; leave out {argv[0]}")
    compared = comparisons()
    tables = committed_tables(compared)
    for page in PAGES:
        path = ROOT / page
        path.write_text(rewritten(path.read_text(), tables))
        print(path)
    for name, comparison in compared.items():
        print(report.write_comparison(comparison, COMPARISONS / name, svg=False))
    for results in read_all():
        plot = themed(import_module(f"experiments.{results.experiment}").plot)
        drawing.save(plot(results), FOLDER, results.experiment, svg=False)
    return 0


def read_all() -> list[Results]:
    """All committed results of the paper's experiments, by name."""
    files = sorted(set(FOLDER.glob("*.json")) - {COSTS})
    return [Results.read(path) for path in files]


def comparisons() -> dict[str, Comparison]:
    """All committed comparisons, by name."""
    files = sorted(COMPARISONS.glob("*/comparison.json"))
    return {path.parent.name: Comparison(Results.read(path)) for path in files}


def committed_tables(compared: Mapping[str, Comparison]) -> dict[str, str]:
    """The current tables of the pages: of results, comparisons and rules."""
    judged = []
    for within in WITHIN:
        name = within.comparison
        claims = [claim_within(within, compared[name])]
        claims += [claim_across(p, compared) for p in ACROSS if p.claim and p.one[0] == name]
        judged.append(replace(compared[name].results, experiment=name, rows=[], claims=claims))
    tables = all_tables([*read_all(), *judged])
    tables |= {"schemes": rules_table.table(), "across": across(compared)}
    for name, comparison in compared.items():
        tables[f"compared_{name}"] = report.comparison_summary(comparison)
        if comparison.target:
            tables[f"target_{name}"] = report.by_depth(comparison, report.to_target)
    return tables


def all_tables(found: Sequence[Results]) -> dict[str, str]:
    """The name and the Markdown of each table of results."""
    full, reduced = report.number_tables(found)
    costs = json.loads(COSTS.read_text())["costs"]
    whole = {results.experiment for results in found if results.scale == "paper"}
    chosen = []
    for results in found:
        start = FOREMOST.get(results.experiment)
        claims = [claim for claim in results.claims if start and claim.text.startswith(start)]
        chosen.append(replace(results, claims=claims))
    tables = {
        "claims": report.claims_table(found),
        "foremost": report.claims_table(chosen),
        "numbers": full,
        "reduced": reduced,
        "commands": report.commands_table(found),
        "costs": costs_table([cost for cost in costs if cost["experiment"] not in whole]),
    }
    return tables | {results.experiment: report.settings_table(results) for results in found}


def claim_within(within: Within, comparison: Comparison) -> Claim:
    """A claim on the baselines of ReZero, in a setting smaller than the paper's."""
    cells = [c for c in comparison.cells if c.rule not in (comparison.control, NO_LAYERS)]
    differences = [comparison.difference(cell) for cell in cells]
    holds = together(
        [
            None if d is None or d.verdict == NOT_SIGNIFICANT else d.verdict == within.needs
            for d in differences
        ]
    )
    shown = [f"{cell.rule} {report.loss_and_difference(comparison, cell)}" for cell in cells]
    evidence = f"final test loss (nats), and minus ReZero's: {'; '.join(shown)}"
    n = len(cells[0].final.draws) if cells[0].final else 0
    return Claim(within.claim, within.source, holds, evidence, n, reduced=True)


def _sides(pair: Pair, compared: Mapping[str, Comparison]) -> list[Cell]:
    """The one and the other cell; each comparison has a single depth."""
    return [cell for name, rule in (pair.one, pair.other) for cell in compared[name].of(rule)]


def _shared(*rows: Row | None) -> list[tuple]:
    """The draws of two rows for the seeds that both have."""
    draws = [row.draws if row else () for row in rows]
    return [one[: min(map(len, draws))] for one in draws]


def bits_across(pair: Pair, compared: Mapping[str, Comparison]) -> Sample:
    """Bits per byte of the one minus those of the other, for each seed that both have."""
    one, other = _shared(*(cell.final for cell in _sides(pair, compared)))
    return Sample([x if x is None else x / math.log(2) for x in paired(one, other)])


def across(compared: Mapping[str, Comparison]) -> str:
    """A line for each of ACROSS."""
    head = ("one", "other", "bits per byte of the one minus the other's", "n")
    lines: list[Sequence[str]] = [(*head, "updates to the target, the other's over the one's")]
    for pair in ACROSS:
        bits = bits_across(pair, compared)
        names = (f"`{rule}` of `{name}`" for name, rule in (pair.one, pair.other))
        one, other = _shared(*(cell.to_target for cell in _sides(pair, compared)))
        times = Sample(quotients(other, one), log=True).shown
        lines.append((*names, bits.shown, str(len(bits.draws)), times))
    return markdown_table(lines)


def claim_across(pair: Pair, compared: Mapping[str, Comparison]) -> Claim:
    """The claim of a pair, in a setting smaller than the paper's."""
    draws = bits_across(pair, compared).draws
    source, quantity = "protocol.md, E2", "bits per byte minus the other's"
    return bounded(pair.claim, source, quantity, draws, high=0, reduced=True)


def costs_table(costs: Sequence[Mapping[str, str | int | float]]) -> str:
    """The hours that experiments and comparisons take on a TPU."""
    lines = [("experiment", "runs", "updates of all runs", "hours")]
    for cost in costs:
        name = str(cost["experiment"])
        shown = name if ":" in name else f"`python -m experiments {name} --scale=paper`"
        hours = number(float(cost["seconds"]) / 3600, 2)
        lines.append((shown, str(cost["runs"]), f"{cost['updates']:,}", hours))
    return markdown_table(lines)


def rewritten(text: str, tables: Mapping[str, str]) -> str:
    """The page with the current version of each of its tables.

    Raises:
      UserError: a table has no end, or an unknown name.
    """

    def table(place: re.Match[str]) -> str:
        if place[1] not in tables:
            raise UserError(f"there is no table {place[1]!r}; give one of {', '.join(tables)}")
        return f"<!-- {place[1]} -->\n{tables[place[1]]}\n<!-- end -->"

    written, count = re.subn(
        r"<!-- (?!end )(\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL
    )
    if 2 * count != text.count("<!--"):
        raise UserError("a table has no <!-- NAME --> or no <!-- end -->; write both around it")
    return written
