"""The tables of the README and the docs are those of the rules and of the committed results."""

import math

import pytest

from experiments import accelerator, report
from experiments.__main__ import main
from experiments.published import Claim
from experiments.results import Made, Results, Row
from experiments.results_page import (
    CLAIMS,
    COMPARISONS,
    PAGES,
    ROOT,
    across,
    all_tables,
    committed_tables,
    comparisons,
    costs_table,
    judge,
    read_all,
    rewritten,
)
from experiments.statistics import Censored
from rezero_jax.errors import UserError
from rezero_jax.formatting import number
from tests.test_compare import compare, rows
from tests.test_docs import check

COMMAND = "python -m experiments results"


@pytest.mark.slow
def test_the_pages_are_what_the_command_writes():
    compared = comparisons()
    tables = committed_tables(compared)
    used = "".join((ROOT / page).read_text() for page in PAGES)
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert rewritten(text, tables) == text, f"run `{COMMAND}`"
    for name in ("claims", "foremost", "numbers", "reduced", "commands", "costs", "schemes"):
        assert f"<!-- {name} -->" in used
    for name, comparison in compared.items():
        assert any(f"<!-- {kind}_{name} -->" in used for kind in ("compared", "target"))
        text = (COMPARISONS / name / "report.md").read_text()
        assert text == report.comparison_report(comparison), f"run `{COMMAND}`"
    # Each claim of the README is one claim.
    assert tables["foremost"].count("\n") == 1 + len(CLAIMS["foremost"])


def test_the_commands_of_all_results_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    for results in read_all():
        check(results.made.command.split(), monkeypatch)


def test_a_new_number_changes_the_tables():
    made = Made("python -m experiments fc", "8 x TPU v5 lite", 3700.4, [])
    found = Results(
        "fc",
        "cpu",
        [
            Row("FC", "epochs to 1.2", (30.0, 32.0), headline=True),
            Row("FC", "epochs to 0.8", (48.0,), headline=True, reduced=True),
            Row("FC + Norm", "epochs to 1.2", (25.0,)),
            Row("a net", "|width|", (7.0,), headline=True),
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
        "| it is so | not significant | 1 | none | nobody knows | `fc` |",
        "| here too | not tested | 1 | none | supported in this setting; seen | `fc` |",
    ]
    assert tables["numbers"].splitlines()[2:] == [
        "| FC, epochs to 1.2 | 31 (18.29 to 43.71) | 29.5 (digitised) | 2 | `fc` |",
        r"| a net, \|width\| | 7 | not given | 1 | `fc` |",
    ]
    assert tables["reduced"].splitlines()[2:] == ["| FC, epochs to 0.8 | 48 | 1 | `fc` |"]
    assert tables["commands"].endswith(
        "| `fc` | `python -m experiments fc` | 8 x TPU v5 lite | 1:01:40 |"
    )
    assert tables["fc"] == (
        "|  | epochs to 1.2 | epochs to 0.8 |\n| --- | --- | --- |\n"
        "| FC | 31 (18.29 to 43.71); paper 29.5 (digitised) | 48 |\n"
        "| FC + Norm | 25; paper 28.8 (digitised) |  |\n\n"
        "|  | a net |\n| --- | --- |\n| \\|width\\| | 7 |\n| depth | 3 |\n\n- a\n- b"
    )
    page = "a\n<!-- reduced -->\nold\n<!-- end -->\nb\n"
    assert rewritten(page, tables) == page.replace("old", tables["reduced"])


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
    costs = {s: all_tables([Results("fc", s, [])])["costs"] for s in ("cpu", "paper")}
    command = "`python -m experiments fc --scale=paper`"
    assert command in costs["cpu"]
    assert command not in costs["paper"]
    jobs = accelerator.compared()["E2: 48 layers, 1,000 updates"]
    assert len(jobs) == 18
    configs = [job.load() for job in jobs]
    assert {(c.model.depth, c.train.steps, c.optim.warmup_steps) for c in configs} == {
        (48, 1000, 50)
    }


def test_only_small_numbers_have_an_exponent():
    values = ((99.7, 2), (9.97, 2), (999.96, 4), (1234.5, 4), (5.6e-4, 4), (0.0, 4))
    texts = ["100", "10", "1,000", "1,234", "5.6e-4", "0"]
    assert [number(*value) for value in values] == texts


def test_an_argument_is_refused(capsys):
    assert main(["results", "--out=x"]) == 2
    assert "--out=x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "of_baselines", "of_the_norm"),
    [
        ([1.5, 1.52, 1.49], False, True),  # better than ReZero
        ([1.7, 1.72, 1.69], True, False),
        ([1.5, 1.75, 1.61], None, None),
    ],
)
def test_the_verdict_of_a_comparison_decides_the_claim_on_it(losses, of_baselines, of_the_norm):
    found = compare(rows("rezero", [1.6, 1.62, 1.59]), rows("rezero_norm", losses))
    for needs, expected in (("higher", of_baselines), ("lower", of_the_norm)):
        fields = {"comparison": "language", "claim": "a claim", "source": "UAI 7", "needs": needs}
        (judged,) = judge({"within": [fields], "across": []}, {"language": found})
        (claim,) = judged.claims
        assert claim.status == "not tested"
        assert claim.holds is expected


@pytest.mark.parametrize(
    ("bits", "shown", "expected"),
    [
        ([-1.0, -1.2, -1.1], "-1.1 (-1.348 to -0.8516)", True),
        ([1.0, 1.2, 1.1], "1.1 (0.8516 to 1.348)", False),
        ([-1.0, 1.2, 0.1], "0.1 (-2.633 to 2.833)", None),
    ],
)
def test_a_rule_minus_one_of_another_comparison_in_pairs_of_seeds(bits, shown, expected):
    losses = [1.5, 1.7, 1.4, 9.0]  # the last seed has no pair
    ours = [loss + math.log(2) * gap for loss, gap in zip(losses, bits, strict=False)]
    compared = {
        "a": compare(rows("rezero", ours, [40.0] * 3), rows("norm", ours)),
        "b": compare(rows("rezero", losses, [60.0, 60.0, Censored(60.0), 60.0])),
    }
    pair = {"one": ["a", "rezero"], "other": ["b", "rezero"], "claim": "a has fewer bits than b"}
    times = ">= 1.5 (1 of 3 right-censored)"
    assert across([pair], compared).splitlines()[-1] == (
        f"| `rezero` of `a` | `rezero` of `b` | {shown} | 3 | {times} |"
    )
    within = {"comparison": "a", "claim": "x", "source": "UAI 7", "needs": "higher"}
    (judged,) = judge({"within": [within], "across": [pair]}, compared)
    claim = judged.claims[-1]
    assert (claim.text, claim.holds, claim.n, claim.reduced) == (pair["claim"], expected, 3, True)
