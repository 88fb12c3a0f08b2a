"""The tables of the README and the docs are those of the rules and of the committed results."""

import math
import re

import pytest

from experiments import accelerator, report, summary
from experiments.published import Claim
from experiments.results import Made, Results, Row
from experiments.results_page import (
    COMPARISONS,
    PAGES,
    ROOT,
    all_tables,
    committed_tables,
    costs_table,
    read_all,
    rewritten,
)
from experiments.statistics import Censored
from experiments.summary import Found
from rezero_jax.errors import UserError
from rezero_jax.formatting import number
from tests.test_compare import compare, rows
from tests.test_docs import check

COMMAND = "python -m experiments results"


@pytest.mark.slow
def test_the_pages_are_what_the_command_writes():
    found = read_all()
    tables = committed_tables(found)
    compared = found.compared
    used = "".join((ROOT / page).read_text() for page in PAGES)
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert rewritten(text, tables) == text, f"run `{COMMAND}`"
    for name in ("claims", "paper_claims", "own_findings", "found", "commands", "costs", "schemes"):
        assert f"<!-- {name} -->" in used
    for name, comparison in compared.items():
        text = (COMPARISONS / name / "report.md").read_text()
        assert text == report.comparison_report(comparison, name), f"run `{COMMAND}`"


BLOCK = r"(?s)<!-- (\w+) -->\n(.*?)<!-- end -->"
# A number with a decimal point, or a percentage.
PROSE_NUMBER = r"(?<![\w.\-/])-?\d[\d,]*\.\d+(?!\.?\d)|(?<![\w.])\d+(?= %)"
# What no run of ours measured: settings (learning rates, targets, levels of tests) ...
SETTINGS = "0.0005 0.001 0.002 0.003 0.01 0.016 0.1 0.2 1.2 1.705 2.5 10 80 95"
# ... and numbers of the paper, of its notebook and of others, each cited where it is used.
CITED = "5.5 6.1 6.27 6.58 7.25 11.3 18.4 1.56 1.838 1.858 1.939 61.7 71.7 81.6 82.9"
NOT_STORED = "83.5 83.7 84.0 84.7"  # the older null result, of which results.md says so


def is_rounded(shown, values):
    """Whether a number of the text is one of the values, in nats or bits, rounded."""
    value, half = abs(float(shown.replace(",", ""))), 0.5 * 10.0 ** -len(shown.partition(".")[2])
    same = (abs(v) * unit for v in values for unit in (1, 1 / math.log(2)))
    return any(abs(value - v) <= half * (1 + 1e-6) for v in same)


def numbers_in(text):
    found = re.findall(r"(?<![\w/])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)
    return [float(number.replace(",", "")) for number in found]


def test_numbers_in_prose_are_in_a_generated_table_or_known_not_to_be_results():
    """In the tables of the same section, or in those of claims and findings, up to rounding."""
    pages = {n: (ROOT / f"docs/{n}.md").read_text() for n in ("results", "evidence", "when")}
    blocks = {n: dict(re.findall(BLOCK, text)) for n, text in pages.items()}
    summaries = [*blocks["results"].values(), blocks["evidence"]["claims"]]
    stored = found_levels() + [v for text in summaries for v in numbers_in(text)]
    everywhere = stored + [v for text in blocks["evidence"].values() for v in numbers_in(text)]
    exempt = f"{SETTINGS} {CITED} {NOT_STORED}".split()
    unknown = []
    for name, page in pages.items():
        for section in re.split(r"(?m)^(?=## )", page):
            tables = [v for _, text in re.findall(BLOCK, section) for v in numbers_in(text)]
            known = stored + tables if name == "evidence" else everywhere
            prose = re.sub(rf"{BLOCK}|(?s:```.*?```)|`[^`]*`|\]\([^)]*\)|arXiv [\d.]+", "", section)
            unknown += [
                (name, section.partition("\n")[0], number)
                for number in re.findall(PROSE_NUMBER, prose)
                if number not in exempt and not is_rounded(number, known)
            ]
    assert not unknown


def found_levels():
    """The entropies of the texts."""
    found = read_all()
    every = [*found.results.values(), *(c.results for c in found.compared.values())]
    return [level for results in every for level in results.levels.values()]


def test_a_number_that_was_not_stored_is_noticed():
    assert is_rounded("2.86", [2.859])
    assert is_rounded("-0.17", [0.1165])  # bits of nats
    assert not is_rounded("2.87", [2.859])


def test_the_commands_of_all_results_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    for results in read_all().results.values():
        check(results.made.command.split(), monkeypatch)


def test_a_new_number_changes_the_tables():
    made = Made("python -m experiments fc", "8 x TPU v5 lite", 3700.4, [])
    found = Results(
        "fc",
        "cpu",
        [
            Row("FC", "epochs to 1.2", (30.0, 32.0)),
            Row("FC", "epochs to 0.8", (48.0,), reduced=True),
            Row("FC + Norm", "epochs to 1.2", (25.0,)),
            Row("a net", "|width|", (7.0,)),
            Row("a net", "depth", (3.0,)),
        ],
        [
            Claim("it is so", "UAI 1", None, "nobody knows", 1),
            Claim("so is this", "UAI 1", True, "seen", 5, (1.0, 2.0)),
            Claim("here too", "UAI 1", True, "seen", reduced=True),
        ],
        remarks=["a", "b"],
        made=made,
    )
    tables = all_tables([found])
    assert tables["claims"].splitlines()[2:] == [  # by status
        "| so is this | replicated | 5 | 1 to 2 | seen | `fc` |",
        "| it is so | not supported | 1 | none | nobody knows | `fc` |",
        "| here too | not tested | 1 | none | supported in this setting; seen | `fc` |",
    ]
    assert report.commands_block([found]).splitlines()[1:-1] == [
        "# fc: 8 x TPU v5 lite, 1:01:40",
        "python -m experiments fc",
    ]
    assert tables["fc"] == (
        "|  | epochs to 1.2 | epochs to 0.8 |\n| --- | --- | --- |\n"
        "| FC | 31 (18.29 to 43.71); paper 29.5 (digitised) | 48 |\n"
        "| FC + Norm | 25; paper 28.8 (digitised) |  |\n\n"
        "|  | a net |\n| --- | --- |\n| \\|width\\| | 7 |\n| depth | 3 |\n\n- a\n- b"
    )
    page = "a\n<!-- claims -->\nold\n<!-- end -->\nb\n"
    assert rewritten(page, tables) == page.replace("old", tables["claims"])


def test_a_page_without_the_place_of_a_table_is_refused():
    start, end = "<!-- claims -->\n", "<!-- end -->"
    for page in (f"{start}no end", f"<!-- unknown -->\n{end}", f"{start}<!-- fc -->\n{end}", end):
        with pytest.raises(UserError, match="table"):
            rewritten(page, {"claims": "x", "fc": "y"})


def test_hours_on_a_tpu_are_listed_for_what_has_not_run():
    cost = {"experiment": "fc", "runs": 20, "updates": 3000000, "seconds": 5400.0}
    assert costs_table([cost, cost | {"experiment": "E2: 12 layers"}]).splitlines()[-2:] == [
        "| `python -m experiments fc --scale=paper` | 20 | 3,000,000 | 1.5 |",
        "| E2: 12 layers | 20 | 3,000,000 | 1.5 |",
    ]
    command = "`python -m experiments fc --scale=paper`"
    tables = [all_tables([Results("fc", scale, [])]) for scale in ("cpu", "paper")]
    assert [command in found["costs"] for found in tables] == [True, False]
    jobs = accelerator.jobs_of(summary.CLAIMS["gpu"]["E2: 48 layers, 1,000 updates"])[0]
    configs = [job.load() for job in jobs]
    assert len(configs) == 18
    found = {(c.model.depth, c.train.steps, c.optim.warmup_steps) for c in configs}
    assert found == {(48, 1000, 50)}


def test_only_small_numbers_have_an_exponent():
    values = ((99.7, 2), (9.97, 2), (999.96, 4), (1234.5, 4), (5.6e-4, 4), (0.0, 4))
    texts = ["100", "10", "1,000", "1,234", "5.6e-4", "0"]
    assert [number(*value) for value in values] == texts


def found(**compared):
    return Found({"fc": results_of_fc()}, compared)


def results_of_fc():
    results = Results("fc", "paper", [Row("FC", "epochs to 1.2", (30.0, 32.0))])
    results.claim("ReZero is so", "UAI 1", True, "seen", 5, interval=(1.0, 2.0))
    results.claim("ReZero is not", "UAI 1", None, "seen", 3)
    return results


def test_a_row_of_the_papers_claims_has_the_status_of_its_weakest_part(monkeypatch):
    entry = {"claim": "c", "paper": "30", "ours": "{fc|FC|epochs to 1.2}", "experiment": "fc"}
    entry |= {"setting": "same", "link": "x"}
    for starts, status in ((["ReZero is so"], "replicated"), (["ReZero is"], "not supported")):
        monkeypatch.setitem(summary.CLAIMS, "paper", [entry | {"claims": starts}])
        row = summary.paper_table(found()).splitlines()[-1]
        assert f"| 31 (18.29 to 43.71) | {5 if status == 'replicated' else 3} | same |" in row
        assert row.endswith(f"[{status}](evidence.md#x) |")
    monkeypatch.setitem(summary.CLAIMS, "paper", [entry | {"claims": ["no such"]}])
    with pytest.raises(UserError, match="no such"):
        summary.paper_table(found())


def test_a_text_asks_for_numbers_that_are_stored():
    ours = compare(rows("rezero", [1.6, 1.62, 1.59]), rows("norm", [1.5, 1.52, 1.49]))
    text = "{fc|FC|epochs to 1.2|mean} and {a|norm|bits} or {a|norm|8 nats}"
    assert summary.filled(text, found(a=ours)) == "31 and 0.14 or 0.1"
    for name in ("fc|FC|depth", "a|norm|7 nats", "nothing", "b|norm|bits"):
        with pytest.raises(UserError, match=re.escape(name)):
            summary.filled(f"{{{name}}}", found(a=ours))


def test_a_finding_is_significant_by_its_interval(monkeypatch):
    entries = [
        {"effect": "e", "kind": "within", "comparison": "a", "rules": ["norm"]},
        {"effect": "e", "kind": "count", "comparison": "a", "test": "Bonferroni"},
    ]
    monkeypatch.setitem(summary.CLAIMS, "own", entries)
    for losses, word, against in (
        ([1.5, 1.52, 1.49], "significant", 1),
        ([1.5, 1.75, 1.61], "not significant", 0),
    ):
        ours = compare(rows("rezero", [1.6, 1.62, 1.59]), rows("norm", losses))
        within, counted = summary.own_table(found(a=ours)).splitlines()[2:]
        assert within.endswith(f"| 3 | {word} |")
        assert f"0 of 1 for ReZero, {against} against" in counted


@pytest.mark.parametrize(
    ("bits", "shown"),
    [([-1.0, -1.2, -1.1], "-1.1 (-1.348 to -0.8516)"), ([-1.0, 1.2, 0.1], "0.1 (-2.633 to 2.833)")],
)
def test_a_rule_minus_one_of_another_comparison_in_pairs_of_seeds(bits, shown, monkeypatch):
    losses = [1.5, 1.7, 1.4, 9.0]  # the last seed has no pair
    ours = [loss + math.log(2) * gap for loss, gap in zip(losses, bits, strict=False)]
    compared = {
        "a": compare(rows("rezero", ours, [40.0] * 3), rows("norm", ours)),
        "b": compare(rows("rezero", losses, [60.0, 60.0, Censored(60.0), 60.0])),
    }
    pair = {"one": ["a", "rezero"], "other": ["b", "rezero"], "kind": "across", "effect": "e"}
    monkeypatch.setitem(summary.CLAIMS, "own", [pair])
    monkeypatch.setitem(summary.CLAIMS, "across", [])
    times = ">= 1.5 (1 of 3 right-censored)"
    assert summary.across(compared).splitlines()[-1] == (
        f"| `rezero` of `a` | `rezero` of `b` | {shown} | 3 | {times} |"
    )
    word = "significant" if abs(bits[2]) > 1 else "not significant"
    line = summary.own_table(Found({}, compared)).splitlines()[-1]
    assert line == f"| e | {shown} | 3 | {word} (uncorrected) |"
