"""Writes the tables of README.md, docs/results.md and docs/schemes.md.

    python -m experiments results

They come from the results in docs/paper and docs/comparisons, and from the rules. A table stands
between <!-- NAME --> and <!-- end -->; all else in the pages is written by hand.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments import compare_report, rules_table
from experiments.claims import WORDS, bounded, fact, inside, together
from experiments.comparison import NO_LAYERS, Cell, Comparison
from experiments.jobs import ROOT
from experiments.ratios import Ratio
from experiments.report import claims_table, number_tables
from experiments.results import Made, Results, Row
from rezero_jax.errors import UserError
from rezero_jax.formatting import markdown_table, number

FOLDER = ROOT / "docs" / "paper"
COMPARISONS = ROOT / "docs" / "comparisons"  # what `python -m experiments compare` wrote
PAGES = ("README.md", "docs/results.md", "docs/schemes.md")
COSTS = FOLDER / "v5e-8.json"  # written by experiments.accelerator
FOREMOST = {  # the claims of README.md, by the experiment and their beginning
    "notebook_fc": "ReZero, 64 layers",
    "fc": "ReZero fits",
    "initialisation": "ReZero, 12 layers",
    "depth": "ReZero nets of up",
    "notebook_resnet": "ResNet-20 with",
    "language": "12-layer",
}
# The comparisons of part E2 of protocol.md: a claim, its source, and what every rival of ReZero
# must be found for it to hold.
LANGUAGE_MODELS = {
    "language": (
        "12-layer language models end with fewer bits with ReZero than with its rivals, each at "
        "its own best rate",
        "UAI 7",
        "worse",
    ),
    "language_lamb": (
        "With LAMB and a warm-up, 12-layer language models end with fewer bits with ReZero than "
        "with its rivals, each at its own best rate",
        "UAI 7",
        "worse",
    ),
    "language_lamb_no_warmup": (
        "With LAMB and no warm-up, 12-layer language models end with fewer bits with ReZero than "
        "with pre-norm, each at its own best rate",
        "UAI 7",
        "worse",
    ),
    "language_norm": (
        "ReZero is behind for want of a norm: with one in every branch and one before the head "
        "(rezero_norm) it ends with fewer bits",
        "protocol.md, E2",
        "better",
    ),
}


class Pair(NamedTuple):
    """A rule of one comparison less a rule of another, in pairs of seeds.

    Attributes:
      one, other: the comparison and the rule.
      claim: that the one ends with fewer bits; "" if nothing is claimed.
    """

    one: tuple[str, str]
    other: tuple[str, str]
    claim: str = ""


ACROSS = (
    Pair(("language_norm", "rezero_norm"), ("language", "pre_norm")),
    Pair(
        ("language_lamb_no_warmup", "rezero"),
        ("language_lamb", "rezero"),
        "A warm-up is what holds ReZero back with LAMB: without one it ends with fewer bits",
    ),
    Pair(
        ("language_lamb_no_warmup", "rezero"),
        ("language_lamb", "post_norm"),
        "With LAMB, ReZero without a warm-up ends with fewer bits than post-norm with one",
    ),
    Pair(("language_lamb_no_warmup", "pre_norm"), ("language_lamb", "pre_norm")),
    Pair(("language_lamb_no_warmup", "rezero"), ("language", "rezero")),
)


def main(argv: Sequence[str]) -> int:
    """Writes all pages and the reports of comparisons with their plots; returns the exit status.

    Raises:
      UserError: there are arguments, or a page lacks the place of a table.
    """
    if argv:
        raise UserError(f"{argv[0]} means nothing here; `python -m experiments results` is all")
    compared = comparisons()
    tables = committed_tables(compared)
    for page in PAGES:
        path = ROOT / page
        path.write_text(rewritten(path.read_text(), tables))
        print(path)
    for name, comparison in compared.items():
        print(compare_report.write_markdown(comparison, COMPARISONS / name))
    return 0


def read_all() -> list[Results]:
    """All committed results, by name."""
    files = sorted(set(FOLDER.glob("*.json")) - {COSTS})
    return [Results.read(path) for path in files]


def comparisons() -> dict[str, Comparison]:
    """All committed comparisons, by name."""
    return {path.parent.name: Comparison.read(path.parent) for path in COMPARISONS.glob("*/*.json")}


def committed_tables(compared: Mapping[str, Comparison]) -> dict[str, str]:
    """The tables of the pages as they should stand: of results, comparisons and rules."""
    found = read_all()
    found += [language_models(name, compared[name]) for name in LANGUAGE_MODELS]
    found += [claim_across(pair, compared) for pair in ACROSS if pair.claim]
    tables = all_tables(found) | {"schemes": rules_table.table(), "across": across(compared)}
    for name, comparison in compared.items():
        tables[f"compared_{name}"] = compare_report.summary(comparison)
        if comparison.target is not None:
            tables[f"raced_{name}"] = compare_report.race(comparison)
    return tables


def all_tables(found: Sequence[Results]) -> dict[str, str]:
    """The name and the Markdown of each table of results."""
    full, reduced = number_tables(found)
    costs = json.loads(COSTS.read_text())["costs"]
    whole = {results.experiment for results in found if results.scale == "paper"}
    chosen = []
    for results in found:
        start = FOREMOST.get(results.experiment)
        claims = [claim for claim in results.claims if start and claim.text.startswith(start)]
        chosen.append(Results(results.experiment, results.scale, [], claims, made=results.made))
    tables = {
        "claims": claims_table(found),
        "foremost": claims_table(chosen),
        "numbers": full,
        "reduced": reduced,
        "costs": costs_table([cost for cost in costs if cost["experiment"] not in whole]),
    }
    return tables | {results.experiment: settings_table(results) for results in found}


def language_models(name: str, comparison: Comparison) -> Results:
    """The claim of one of LANGUAGE_MODELS, undecided of the paper, as all is smaller than there."""
    text, source, wanted = LANGUAGE_MODELS[name]
    rivals = [c for c in comparison.cells if c.rule not in (comparison.control, NO_LAYERS)]
    differences = [comparison.difference(cell) for cell in rivals]
    words = {"undecided": None} | {word: word == wanted for word in ("better", "worse")}
    holds = together([words[d.verdict] if d else None for d in differences])
    shown = [f"{cell.rule} {compare_report.in_short(comparison, cell)}" for cell in rivals]
    evidence = (
        f"in this setting {WORDS[holds]}; final test loss (nats), and less ReZero's: "
        f"{'; '.join(shown)}"
    )
    claim = fact(text, source, holds, evidence, n=len(rivals[0].losses), reduced=True)
    return Results(name, "cpu", [], [claim], made=_made(comparison))


def bits_across(pair: Pair, compared: Mapping[str, Comparison]) -> Row:
    """Bits per byte of the one less those of the other, of each seed that both have."""
    pairs = zip(*(side.losses for side in _sides(pair, compared)), strict=False)
    bits = tuple((ours - theirs) / math.log(2) for ours, theirs in pairs)
    return Row(" of ".join(pair.one[::-1]), "bits per byte less the other's", bits, reduced=True)


def across(compared: Mapping[str, Comparison]) -> str:
    """A line for each of ACROSS."""
    head = ("one", "other", "bits per byte of the one less the other's", "n")
    lines: list[Sequence[str]] = [(*head, "updates to the target, the other's over the one's")]
    for pair in ACROSS:
        bits = bits_across(pair, compared)
        names = (f"`{rule}` of `{name}`" for name, rule in (pair.one, pair.other))
        one, other = _sides(pair, compared)
        n = len(bits.ours)
        ratio = Ratio.of_pairs(other.to_target[:n], one.to_target[:n], [other.updates] * n)
        times = ratio.shown if ratio else "the one does not reach it"
        lines.append((*names, bits.shown, str(n), times))
    return markdown_table(lines)


def _sides(pair: Pair, compared: Mapping[str, Comparison]) -> list[Cell]:
    """The one and the other, which each have a single depth."""
    return [cell for name, rule in (pair.one, pair.other) for cell in compared[name].of(rule)]


def claim_across(pair: Pair, compared: Mapping[str, Comparison]) -> Results:
    """The claim of a pair, undecided of the paper, as all is smaller than there."""
    bits = bits_across(pair, compared)
    word = WORDS[inside(bits.interval, -math.inf, 0) if bits.interval else None]
    quantity = f"in this setting {word}; {bits.quantity}"
    claim = bounded(pair.claim, "protocol.md, E2", quantity, bits.ours, high=0, reduced=True)
    return Results(pair.one[0], "cpu", [], [claim], made=_made(compared[pair.one[0]]))


def _made(comparison: Comparison) -> Made:
    return Made(comparison.command, comparison.cells[0].device, comparison.seconds, [])


def settings_table(results: Results) -> str:
    """Every number of an experiment by setting and quantity, beside the paper's; its remarks.

    Settings that have a quantity in common share a table. The more numerous have the lines.
    """
    cells: dict[str, dict[str, str]] = {}
    for row in results.rows:
        paper = results.paper(row)
        shown = f"{row.shown}; paper {paper.shown}" if paper else row.shown
        cells.setdefault(row.setting, {})[row.quantity] = shown
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
    """A table of texts by setting and quantity."""
    quantities = list(dict.fromkeys(name for one in numbers.values() for name in one))
    lines = [(name, *(one.get(q, "") for q in quantities)) for name, one in numbers.items()]
    table = [("", *quantities), *lines]
    return markdown_table(zip(*table, strict=True) if len(quantities) > len(numbers) else table)


def costs_table(costs: Sequence[Mapping[str, str | int | float]]) -> str:
    """What experiments and comparisons take on a TPU, in hours."""
    lines = [("experiment", "runs", "updates of all runs", "hours")]
    for cost in costs:
        name = str(cost["experiment"])
        shown = name if ":" in name else f"`python -m experiments {name} --scale=paper`"
        hours = number(float(cost["seconds"]) / 3600, 2)
        lines.append((shown, str(cost["runs"]), f"{cost['updates']:,}", hours))
    return markdown_table(lines)


def rewritten(text: str, tables: Mapping[str, str]) -> str:
    """The page with each of its tables as it is now.

    Raises:
      UserError: a table has no end, or a name that there is no table for.
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
