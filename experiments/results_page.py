"""Writes the generated tables of README.md and the documentation.

    python -m experiments results

A table is between <!-- NAME --> and <!-- end -->; all else in the pages is written by hand.
"""

import inspect
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import drawing, report
from experiments.comparison import NO_LAYERS, Cell, Comparison
from experiments.jobs import ROOT
from experiments.results import Results, Row
from experiments.statistics import NOT_SIGNIFICANT, Sample, holds, paired, quotients, together
from rezero_jax.analysis.theme import themed
from rezero_jax.errors import UserError
from rezero_jax.formatting import markdown_table, number
from rezero_jax.models.transformer.layer import EncoderLayer
from rezero_jax.residual import RULES, Place
from rezero_jax.training.cost import flops

FOLDER = ROOT / "docs" / "paper"
COMPARISONS = ROOT / "docs" / "comparisons"  # written by `python -m experiments compare`
PAGES = ("README.md", "docs/results.md", "docs/schemes.md")
COSTS = FOLDER / "v5e-8.json"  # written by experiments.accelerator
CLAIMS = tomllib.loads((COMPARISONS / "claims.toml").read_text())
WIDTH, HEADS, LAYERS = 256, 4, 12
Table: TypeAlias = Mapping[str, Any]  # of claims.toml


def main(argv: Sequence[str]) -> int:
    """Writes all pages, the reports of comparisons and all plots; returns the exit status."""
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
    return [Results.read(path) for path in sorted(set(FOLDER.glob("*.json")) - {COSTS})]


def comparisons() -> dict[str, Comparison]:
    """All committed comparisons, by name."""
    files = sorted(COMPARISONS.glob("*/comparison.json"))
    return {path.parent.name: Comparison(Results.read(path)) for path in files}


def committed_tables(compared: Mapping[str, Comparison]) -> dict[str, str]:
    """The current tables of the pages: of results, comparisons and rules."""
    tables = all_tables([*read_all(), *judge(CLAIMS, compared)])
    tables |= {"schemes": rules_table(), "across": across(CLAIMS["across"], compared)}
    for name, comparison in compared.items():
        tables[f"compared_{name}"] = report.comparison_summary(comparison)
        if comparison.has_target:
            tables[f"target_{name}"] = report.by_depth(comparison, report.to_target)
    return tables


def all_tables(found: Sequence[Results]) -> dict[str, str]:
    """The name and the Markdown of each table of results."""
    full, reduced = report.number_tables(found)
    costs = json.loads(COSTS.read_text())["costs"]
    whole = {results.experiment for results in found if results.scale == "paper"}
    chosen = []
    for results in found:
        start = CLAIMS["foremost"].get(results.experiment)
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


def judge(claims: Table, compared: Mapping[str, Comparison]) -> list[Results]:
    """The claims on comparisons, all of settings smaller than the paper's."""
    judged = []
    for within in claims["within"]:
        name = within["comparison"]
        comparison = compared[name]
        results = Results(name, "", made=comparison.results.made)
        cells = [c for c in comparison.cells if c.rule not in (comparison.control, NO_LAYERS)]
        words = [d.verdict if (d := comparison.difference(c)) else NOT_SIGNIFICANT for c in cells]
        found = together([holds(word, within["needs"]) for word in words])
        shown = [f"{cell.rule} {report.loss_and_difference(comparison, cell)}" for cell in cells]
        evidence = f"final test loss (nats), and minus ReZero's: {'; '.join(shown)}"
        n = len(cells[0].final.draws) if cells[0].final else 0
        results.claim(within["claim"], within["source"], found, evidence, n, reduced=True)
        for pair in claims["across"]:
            if "claim" in pair and pair["one"][0] == name:
                bits = bits_across(pair, compared).draws
                of = (pair["claim"], "protocol.md, E2", "bits per byte minus the other's", bits)
                results.bounded(*of, high=0, reduced=True)
        judged.append(results)
    return judged


def _shared(rows: Iterable[Row | None]) -> list[tuple]:
    """The draws of two rows for the seeds that both have."""
    draws = [row.draws if row else () for row in rows]
    return [one[: min(map(len, draws))] for one in draws]


def _sides(pair: Table, compared: Mapping[str, Comparison]) -> list[Cell]:
    """The one and the other cell; each comparison has a single depth."""
    return [cell for key in ("one", "other") for cell in compared[pair[key][0]].of(pair[key][1])]


def bits_across(pair: Table, compared: Mapping[str, Comparison]) -> Sample:
    """Bits per byte of the one minus those of the other, for each seed that both have."""
    one, other = _shared(cell.final for cell in _sides(pair, compared))
    return Sample(x if x is None else x / math.log(2) for x in paired(one, other))


def across(pairs: Sequence[Table], compared: Mapping[str, Comparison]) -> str:
    """A line for each rule of one comparison against a rule of another."""
    head = ("one", "other", "bits per byte of the one minus the other's", "n")
    lines: list[Sequence[str]] = [(*head, "updates to the target, the other's over the one's")]
    for pair in pairs:
        bits = bits_across(pair, compared)
        names = (f"`{rule}` of `{name}`" for name, rule in (pair["one"], pair["other"]))
        one, other = _shared(cell.to_target for cell in _sides(pair, compared))
        times = Sample(quotients(other, one), log=True).shown
        lines.append((*names, bits.shown, str(len(bits.draws)), times))
    return markdown_table(lines)


def costs_table(costs: Sequence[Mapping[str, str | int | float]]) -> str:
    """The hours that experiments and comparisons take on a TPU."""
    lines = [("experiment", "runs", "updates of all runs", "hours")]
    for cost in costs:
        name = str(cost["experiment"])
        shown = name if ":" in name else f"`python -m experiments {name} --scale=paper`"
        hours = number(float(cost["seconds"]) / 3600, 2)
        lines.append((shown, str(cost["runs"]), f"{cost['updates']:,}", hours))
    return markdown_table(lines)


def rules_table() -> str:
    """Each rule's equation, initial values, sources, and costs minus those of `residual`."""
    base = _costs("residual")
    head = ("name", "rule", "initial values", "parameters", "operations", "source")
    rows: list[Sequence[str]] = [(*head, "reference code")]
    for name, rule in RULES.items():
        more, count = (x - y for x, y in zip(_costs(name), base, strict=True))
        if count >= 10_000:  # what JAX makes of an equation differs between its versions
            count = round(count, 3 - len(str(count)))
        equation = (inspect.getdoc(rule) or "").splitlines()[0].rstrip(".")
        start, paper, code = rule.reference.start, rule.reference.paper, rule.reference.code
        rows.append((f"`{name}`", equation, start, f"{more:,}", f"{count:,}", paper, code))
    return markdown_table(rows)


def _costs(rule: str) -> tuple[int, int]:
    """Parameters of an encoder layer, and the operations of its forward pass for each position."""
    options: Any = {"residual": rule, "attention": "plain", "place": Place(1, LAYERS)}
    layer = nnx.eval_shape(lambda: EncoderLayer(WIDTH, HEADS, **options, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    x = jax.eval_shape(RULES[rule].enter, jax.ShapeDtypeStruct((1, 1, WIDTH), jnp.float32))
    operations = flops(lambda state, x: nnx.merge(graphdef, state)(x), state, x, everything=True)
    sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    return sum(sizes), operations


def rewritten(text: str, tables: Mapping[str, str]) -> str:
    """The page with the current version of each of its tables."""

    def table(place: re.Match[str]) -> str:
        if place[1] not in tables:
            raise UserError(f"there is no table {place[1]!r}; give one of {', '.join(tables)}")
        return f"<!-- {place[1]} -->\n{tables[place[1]]}\n<!-- end -->"

    pattern = r"(?s)<!-- (?!end )(\w+) -->\n.*?<!-- end -->"
    written, count = re.subn(pattern, table, text)
    if 2 * count != text.count("<!--"):
        raise UserError("a table has no <!-- NAME --> or no <!-- end -->; write both around it")
    return written
