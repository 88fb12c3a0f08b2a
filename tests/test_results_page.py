"""The tables of the README and the docs are those of the rules and of the committed results."""

import math

import pytest

from experiments import compare as compare_command
from experiments import compare_report, results_page
from experiments.__main__ import main
from experiments.accelerator import COMPARISONS as COSTED
from experiments.claims import Claim
from experiments.results import Made, Results, Row
from experiments.results_page import (
    COMPARISONS,
    FOREMOST,
    LANGUAGE_MODELS,
    PAGES,
    ROOT,
    Pair,
    across,
    all_tables,
    claim_across,
    committed_tables,
    comparisons,
    costs_table,
    language_models,
    read_all,
    rewritten,
    settings_table,
)
from rezero_jax.errors import UserError
from rezero_jax.formatting import number
from tests.test_compare import cell, compare
from tests.test_docs import check

COMMAND = "python -m experiments results"


def test_the_pages_are_what_the_command_writes():
    compared = comparisons()
    tables = committed_tables(compared)
    used = "".join((ROOT / page).read_text() for page in PAGES)
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert rewritten(text, tables) == text, f"run `{COMMAND}`"
    for name in ("claims", "foremost", "numbers", "reduced", "costs", "initialisation", "schemes"):
        assert f"<!-- {name} -->" in used
    for name, comparison in compared.items():
        assert any(f"<!-- {kind}_{name} -->" in used for kind in ("compared", "raced"))
        report = (COMPARISONS / name / "report.md").read_text()
        assert report == compare_report.markdown(comparison), f"run `{COMMAND}`"


def test_each_foremost_claim_is_one_claim():
    compared = comparisons()
    judged = [language_models(name, compared[name]) for name in LANGUAGE_MODELS]
    for results in (*read_all(), *judged):
        start = FOREMOST.get(results.experiment, "none")
        claims = [claim for claim in results.claims if claim.text.startswith(start)]
        assert len(claims) == (results.experiment in FOREMOST)


def test_the_commands_of_all_results_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    for results in read_all():
        line = results.made.command
        for name, value in (("RULE", "rezero"), ("SEED", "1"), ("DEPTH", "20"), ("LR", "0.1")):
            line = line.replace(f"={name}", f"={value}")
        check(line.split(), monkeypatch)


def test_a_new_number_changes_the_table_of_its_experiment():
    made = Made("python -m experiments fc", "TPU", 60.0, [])
    rows = [
        Row("FC", "epochs to 1.2", (30.0,), headline=True),
        Row("FC", "epochs to 0.8", (48.0,), headline=True, reduced=True),
        Row("FC + Norm", "epochs to 1.2", (25.0,)),
        Row("a net", "width", (7.0,)),
        Row("a net", "depth", (3.0,)),
    ]
    claims = [Claim("it is so", "UAI 1", "replicated", "exact", 1)]
    results = Results("fc", "cpu", rows, claims, remarks=["a", "b"], made=made)
    assert settings_table(results) == (
        "|  | epochs to 1.2 | epochs to 0.8 |\n| --- | --- | --- |\n"
        "| FC | 30; paper 29.5 (digitised) | 48 |\n"
        "| FC + Norm | 25; paper 28.8 (digitised) |  |\n\n"
        "|  | a net |\n| --- | --- |\n| width | 7 |\n| depth | 3 |\n\n- a\n- b"
    )
    page = "a\n<!-- claims -->\nold\n<!-- end -->\nb\n<!-- fc -->\n<!-- end -->\n"
    before, (claimed, of_fc) = "a\n", all_pages(results)
    assert rewritten(page, all_tables([results])) == (
        f"{before}<!-- claims -->\n{claimed}\n<!-- end -->\nb\n<!-- fc -->\n{of_fc}\n<!-- end -->\n"
    )
    last = claimed.splitlines()[-1]
    assert last == (
        "| it is so | replicated | 1 | none needed | exact | `python -m experiments fc` | 0:01:00 |"
    )


def all_pages(results):
    tables = all_tables([results])
    return tables["claims"], tables["fc"]


@pytest.mark.parametrize(
    "page",
    [
        "<!-- claims -->\nno end",
        "<!-- unknown -->\n<!-- end -->",
        "<!-- claims -->\n<!-- fc -->\n<!-- end -->",
        "<!-- end -->",
    ],
)
def test_a_page_without_the_place_of_a_table_is_refused(page):
    with pytest.raises(UserError, match="table"):
        rewritten(page, {"claims": "x", "fc": "y"})


def test_hours_on_a_tpu():
    cost = {"experiment": "fc", "runs": 20, "updates": 3000000, "seconds": 5400.0}
    assert costs_table([cost, cost | {"experiment": "E2: 12 layers"}]).splitlines()[-2:] == [
        "| `python -m experiments fc --scale=paper` | 20 | 3,000,000 | 1.5 |",
        "| E2: 12 layers | 20 | 3,000,000 | 1.5 |",
    ]


def test_what_has_run_at_the_papers_scale_is_not_among_what_could_not():
    command = "`python -m experiments fc --scale=paper`"
    costs = {s: all_tables([Results("fc", s, [])])["costs"] for s in ("cpu", "paper")}
    assert command in costs["cpu"]
    assert command not in costs["paper"]
    assert len(costs["cpu"].splitlines()) == len(costs["paper"].splitlines()) + 1


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (99.7, 2, "100"),
        (9.97, 2, "10"),
        (999.96, 4, "1,000"),
        (123.4, 2, "123"),
        (1234.5, 4, "1,234"),
        (5.6e-4, 4, "5.6e-4"),
        (0.0, 4, "0"),
    ],
)
def test_numbers_have_no_exponent_but_the_small_ones(value, digits, text):
    assert number(value, digits) == text


def test_an_argument_is_refused(capsys):
    assert main(["results", "--out=x"]) == 2
    assert "is all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "of_rivals", "of_the_norm"),
    [
        ([1.5, 1.52, 1.49], "contradicted", "supported"),  # better than ReZero
        ([1.7, 1.72, 1.69], "supported", "contradicted"),
        ([1.5, 1.75, 1.61], "undecided", "undecided"),
    ],
)
def test_the_verdict_of_a_comparison_decides_the_claim_on_it(losses, of_rivals, of_the_norm):
    found = compare(cell("rezero", [1.6, 1.62, 1.59]), cell("rezero_norm", losses))
    for name, word in (("language", of_rivals), ("language_norm", of_the_norm)):
        (claim,) = language_models(name, found).claims
        assert claim.status == "undecided"  # of the paper
        assert claim.evidence.startswith(f"in this setting {word}; ")


@pytest.mark.parametrize(
    ("bits", "shown", "word"),
    [
        ([-1.0, -1.2, -1.1], "-1.1 (-1.348 to -0.8516)", "supported"),
        ([1.0, 1.2, 1.1], "1.1 (0.8516 to 1.348)", "contradicted"),
        ([-1.0, 1.2, 0.1], "0.1 (-2.633 to 2.833)", "undecided"),
    ],
)
def test_a_rule_less_one_of_another_comparison_in_pairs_of_seeds(bits, shown, word, monkeypatch):
    losses = [1.5, 1.7, 1.4, 9.0]  # the last seed has no pair
    ours = [loss + math.log(2) * less for loss, less in zip(losses, bits, strict=False)]
    compared = {
        "a": compare(cell("rezero", ours, to_target=[40.0] * 3)),
        "b": compare(cell("rezero", losses, to_target=[60.0] * 4)),
    }
    pair = Pair(("a", "rezero"), ("b", "rezero"), "a ends with fewer bits than b")
    monkeypatch.setattr(results_page, "ACROSS", (pair,))
    assert across(compared).splitlines()[-1] == (
        f"| `rezero` of `a` | `rezero` of `b` | {shown} | 3 | 1.5 (1.5 to 1.5) |"
    )
    (claim,) = claim_across(pair, compared).claims
    assert (claim.text, claim.status, claim.n) == (pair.claim, "undecided", 3)
    assert claim.evidence.startswith(f"in this setting {word}; ")


def test_the_runs_that_the_costs_of_a_comparison_count():
    jobs = compare_command.certain(COSTED["E2: 48 layers, 1,000 updates"])
    assert [len(of) for of in jobs.values()] == [9, 9]
    configs = [job.load() for job in (*jobs["tuning"], *jobs["reported"])]
    assert {(c.model.depth, c.train.steps, c.optim.warmup_steps) for c in configs} == {
        (48, 1000, 50)
    }


def test_a_target_that_one_of_two_comparisons_does_not_reach(monkeypatch):
    monkeypatch.setattr(results_page, "ACROSS", (Pair(("a", "norm"), ("b", "norm")),))
    never, always = (cell("norm", [1.0, 1.1], to_target=to) for to in ([None] * 2, [40.0] * 2))
    for one, other, shown in (
        (always, never, ">= 2.5"),
        (never, always, "the one does not reach it"),
    ):
        assert across({"a": compare(one), "b": compare(other)}).endswith(f"| 2 | {shown} |")
