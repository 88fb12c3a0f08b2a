"""Writes the generated tables of README.md and the documentation.

A table is between <!-- NAME --> and <!-- end -->; the rest of a page is written by hand. The
numbers come from docs/paper and docs/comparisons, the claims from experiments/claims.toml.
"""

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import drawing, report, summary, summary_plots
from experiments.comparison import Comparison
from experiments.jobs import ROOT
from experiments.results import Results
from experiments.summary import Found
from rezero_jax import command
from rezero_jax.analysis.theme import themed
from rezero_jax.errors import UserError
from rezero_jax.formatting import markdown_table, number
from rezero_jax.models.transformer.layer import EncoderLayer
from rezero_jax.residual import RULES, Place
from rezero_jax.training.cost import flops

FOLDER = ROOT / "docs" / "paper"
COMPARISONS = ROOT / "docs" / "comparisons"  # written by `python -m experiments compare`
PAGES = (
    "README.md",
    "docs/results.md",
    "docs/evidence.md",
    "docs/rules-compared.md",
    "docs/schemes.md",
)
FIGURES = ROOT / "docs" / "figures"
COSTS = FOLDER / "v5e-8.json"  # written by experiments.accelerator
WIDTH, HEADS, LAYERS = 256, 4, 12


def main(argv: Sequence[str]) -> int:
    """Writes all pages, the reports of comparisons and all plots; returns the exit status."""
    command.parser("python -m experiments results", __doc__).parse_args(argv)
    found = read_all()
    tables = committed_tables(found)
    for page in PAGES:
        path = ROOT / page
        path.write_text(rewritten(path.read_text(), tables))
        print(path)
    for name, comparison in found.compared.items():
        print(report.write_comparison(comparison, COMPARISONS / name, svg=False))
    for name, draw in summary_plots.PLOTS.items():
        drawing.save(themed(draw)(found), FIGURES, name)
    for results in found.results.values():
        plot = themed(import_module(f"experiments.{results.experiment}").plot)
        drawing.save(plot(results), FOLDER, results.experiment, svg=False)
    return 0


def read_all() -> Found:
    """All committed results, by experiment and by comparison."""
    stored = [Results.read(path) for path in sorted(set(FOLDER.glob("*.json")) - {COSTS})]
    files = sorted(COMPARISONS.glob("*/comparison.json"))
    compared = {path.parent.name: Comparison(Results.read(path)) for path in files}
    return Found({results.experiment: results for results in stored}, compared)


def committed_tables(found: Found) -> dict[str, str]:
    """The current tables of the pages: of results, comparisons and rules."""
    results, compared = list(found.results.values()), found.compared
    named = [replace(c.results, experiment=f"compare: {name}") for name, c in compared.items()]
    tables = all_tables(results) | {
        "commands": report.commands_block([*results, *named]),
        "paper_claims": summary.paper_table(found),
        "own_findings": summary.own_table(found),
        "found": summary.filled(summary.CLAIMS["readme"]["found"].strip(), found),
        "across": summary.across(compared),
        "schemes": rules_table(),
    }
    for name, comparison in compared.items():
        tables[f"compared_{name}"] = report.comparison_summary(comparison)
        if comparison.has_target:
            tables[f"target_{name}"] = report.by_depth(comparison, report.to_target)
    return tables


def all_tables(found: Sequence[Results]) -> dict[str, str]:
    """The name and the Markdown of each table of results."""
    costs = json.loads(COSTS.read_text())["costs"]
    whole = {results.experiment for results in found if results.scale == "paper"}
    tables = {
        "claims": report.claims_table(found),
        "costs": costs_table([cost for cost in costs if cost["experiment"] not in whole]),
    }
    return tables | {results.experiment: report.settings_table(results) for results in found}


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
