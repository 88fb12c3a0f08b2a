"""The comparison of rules: its grids of learning rates, its intervals and verdicts, its report."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import compare_plots, compare_report, entropies
from experiments.__main__ import main
from experiments.compare import Plan
from experiments.comparison import Cell, Comparison, Curve
from experiments.tuning import FARTHEST, Grid
from rezero_jax.config import load_config

GRID = Grid(0.01, 2.0, range(-1, 2))


def tuned(loss_of: dict[int, float] | None = None, best: int = 0) -> dict[int, float]:
    """The losses that a search ends with, where the loss of k is (k - best)**2."""
    losses: dict[int, float] = {}
    while new := GRID.untried(losses):
        for k in new:
            losses[k] = (loss_of or {}).get(k, float((k - best) ** 2))
    return losses


@pytest.mark.parametrize("best", [-5, -1, 0, 1, 4])
def test_a_grid_grows_until_the_best_rate_lies_inside(best: int) -> None:
    losses = tuned(best=best)
    assert GRID.best(losses) == best
    assert GRID.is_settled(losses)
    assert {best - 1, best + 1} <= losses.keys()
    assert len(losses) <= 3 + abs(best) + 1


def test_a_grid_goes_down_where_every_rate_diverges_and_then_gives_up() -> None:
    losses = tuned({k: math.inf for k in range(-3, 2)}, best=-5)
    assert GRID.best(losses) == -5
    hopeless = tuned({k: math.inf for k in range(-99, 99)})
    assert GRID.best(hopeless) is None
    assert not GRID.is_settled(hopeless)
    assert min(hopeless) == -FARTHEST


def test_a_rate_that_diverges_bounds_the_grid() -> None:
    losses = tuned({1: math.inf, 2: math.inf}, best=7)
    assert GRID.best(losses) == 0
    assert GRID.is_settled(losses)
    assert 2 not in losses


def test_rates_are_a_geometric_row() -> None:
    rates = [GRID.rate(k) for k in range(-2, 3)]
    assert rates == [0.0025, 0.005, 0.01, 0.02, 0.04]


def cell(rule: str, losses: list[float], depth: int = 8, **fields: object) -> Cell:
    curve = Curve(list(range(1, 101)), [3.0 - 0.01 * step for step in range(1, 101)])
    given: dict = {
        "tuning": {0.01: 1.0, 0.02: 0.5, 0.04: math.inf},
        "settled": True,
        "rate": 0.02,
        "to_target": [40.0] * len(losses),
        "curves": [curve] * len(losses),
        "updates": 100,
        "flops": 1000,
        "seconds": 0.5,
        "device": "cpu",
        "commands": ["python train.py"],
    }
    return Cell(rule, depth, losses=losses, **(given | fields))


def compare(*cells: Cell, target: float | None = 2.5) -> Comparison:
    return Comparison("python -m experiments compare", "rezero", target, list(cells))


def test_the_interval_of_paired_differences_is_the_paired_t_tests() -> None:
    one, other = [1.0, 1.3, 1.1, 0.9], [1.2, 1.6, 1.2, 1.3]
    found = compare(cell("rezero", other), cell("norm", one))
    difference = found.difference(found.cells[1])
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert np.allclose(difference.interval, expected)
    assert np.isclose(difference.mean, np.mean(one) - np.mean(other))
    assert difference.verdict == "better"
    back = compare(cell("rezero", one), cell("norm", other))
    assert back.difference(back.cells[1]).verdict == "worse"


def test_many_comparisons_need_a_wider_interval() -> None:
    control, rival = [1.0, 1.1, 0.95], [1.2, 1.25, 1.08]
    alone = compare(cell("rezero", control), cell("norm", rival))
    assert alone.difference(alone.cells[1]).verdict == "worse"
    rest = [cell(f"rule{i}", rival) for i in range(9)]
    among = compare(cell("rezero", control), cell("norm", rival), *rest)
    judged = among.difference(among.cells[1])
    assert judged.verdict == "undecided"
    assert judged.interval == alone.difference(alone.cells[1]).interval
    low, _ = judged.interval
    assert low > 0


def test_a_diverged_run_leaves_nothing_to_decide_and_is_shown() -> None:
    found = compare(cell("rezero", [1.0, 1.1]), cell("plain", [1.0, math.inf]))
    assert found.difference(found.cells[1]) is None
    row = compare_report.table(found, 8)[2]
    assert "diverged in 1 of 2" in row
    assert "undecided" in row


def test_the_noise_floor_is_the_deviation_of_a_usual_cell() -> None:
    a, b, broken = [1.0, 1.2, 1.1], [2.0, 2.6, 2.1], [3e5, 1e5, 2e5]
    noise = compare(cell("rezero", a), cell("norm", b), cell("plain", broken)).noise
    assert np.isclose(noise, np.std(b, ddof=1))
    assert compare(cell("rezero", [1.0])).noise is None


def test_at_equal_cost_the_dearer_rule_is_read_earlier() -> None:
    cheap, dear = cell("rezero", [1.0]), cell("norm", [1.0], flops=2000, seconds=2.0)
    found = compare(cheap, dear)
    last = np.mean([3.0 - 0.01 * step for step in range(96, 101)])
    assert np.isclose(found.equal(cheap, "flops"), last)
    half = np.mean([3.0 - 0.01 * step for step in range(46, 51)])
    assert np.isclose(found.equal(dear, "flops"), half)
    quarter = np.mean([3.0 - 0.01 * step for step in range(21, 26)])
    assert np.isclose(found.equal(dear, "seconds"), quarter)


def test_times_to_the_target_are_ratios_of_pairs() -> None:
    control = cell("rezero", [1.0] * 4, to_target=[40.0, 50.0, 60.0, 45.0])
    slow = cell("norm", [1.0] * 4, to_target=[80.0, 105.0, 118.0, 90.0])
    found = compare(control, slow, cell("plain", [1.0] * 4, to_target=[60.0, 90.0, None, 70.0]))
    ratio, verdict = found.times(found.cells[1])
    logs = np.log(np.divide(slow.to_target, control.to_target))
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert np.allclose(np.log(ratio.interval()), expected)
    assert np.isclose(np.log(ratio.mean), logs.mean())
    assert verdict == "slower"
    bound, verdict = found.times(found.cells[2])
    assert bound.is_bound
    assert verdict == "undecided"
    assert found.times(control) is None
    lost = compare(cell("rezero", [1.0], to_target=[None]), cell("norm", [1.0]))
    assert lost.times(lost.cells[1]) is None
    one_diverged = cell("norm", [1.0, math.inf], to_target=[40.0])
    found = compare(cell("rezero", [1.0, 1.0]), one_diverged)
    assert found.times(one_diverged) is None
    wide = compare(
        control, cell("norm", [1.0] * 4, to_target=[46.0, 62.0, 68.0, 56.0]), *[slow] * 20
    )
    low, _ = wide.times(wide.cells[1])[0].interval()
    assert low > 1
    assert wide.times(wide.cells[1])[1] == "undecided"  # among 21


def test_the_control_without_layers_is_rezero_with_its_gates_held() -> None:
    plan = Plan("configs/mlp.py", (), ["rezero", "rezero_held"], [8], 1, 3, 2.0, 1)
    held, ours = (plan.job(rule, 8, 0.01, 0) for rule in ("rezero_held", "rezero"))
    assert held.name != ours.name
    one, other = held.load().to_dict(), ours.load().to_dict()
    assert one["optim"]["alpha"].pop("learning_rate") == 0.0
    assert other["optim"]["alpha"].pop("learning_rate") is None
    assert one == other


def test_the_report_shows_every_rule_and_the_numbers_are_valid_json(tmp_path: Path) -> None:
    nothing: dict = {"rate": None, "settled": False, "curves": [], "to_target": [], "flops": 0}
    none = cell("plain", [], **nothing, seconds=math.nan)
    found = compare(cell("rezero", [1.0, 1.1]), cell("norm", [1.5, 1.7]), none)
    found.write(tmp_path)
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert saved["cells"][0]["tuning"]["0.04"] is None
    assert repr(Comparison.read(tmp_path)) == repr(found)
    page = compare_report.write(found, tmp_path).read_text()
    markdown = (tmp_path / "report.md").read_text()
    for text in (page, markdown):
        assert all(rule in text for rule in ("rezero", "norm", "plain", "none of 0.01 to 0.04"))
        assert "noise floor" in text
    for name in ("differences.png", "rates.png", "curves.svg"):
        assert (tmp_path / name).stat().st_size > 0
    one, other, last = compare_report.summary(found).splitlines()[2:]
    assert one == "| `rezero` | 1.05 | 1.00x | 1.00x |"
    assert other.startswith("| `norm` | 1.6: 0.55 [-0.085, 1.2], undecided |")
    assert last == "| `plain` | diverged |  |  |"


def test_a_race_tells_the_updates_to_the_target_and_their_ratio() -> None:
    slow = cell("norm", [1.5, 1.7], to_target=[80.0, 88.0])
    late = cell("plain", [1.5, 1.7], to_target=[None, 60.0])
    never = cell("gated", [1.5, 1.7], to_target=[None, None])
    found = compare(cell("rezero", [1.0, 1.1]), slow, late, never)
    head, _, *rows = compare_report.race(found).splitlines()
    assert head == "| rule | 8 layers |"
    ratio, verdict = found.times(slow)
    assert rows == [
        "| `rezero` | 40 [40, 40], n = 2 |",
        f"| `norm` | 84 [33.18, 134.8], n = 2: {ratio.shown}, {verdict} |",
        "| `plain` | in 1 of 2 runs: >= 1.936, undecided |",  # sqrt(100 / 40 x 60 / 40)
        "| `gated` | not reached: >= 2.5, undecided |",
    ]


def test_differences_are_drawn_with_their_intervals() -> None:
    found = compare(cell("rezero", [1.0, 1.1]), cell("norm", [1.5, 1.7]), cell("plain", [math.inf]))
    (axis,) = compare_plots.plot_differences(found).axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["norm", "plain"]
    drawn = [line.get_xdata() for line in axis.lines]
    difference = found.difference(found.cells[1])
    assert any(np.array_equal(x, difference.interval) for x in drawn)
    assert [text.get_text() for text in axis.texts] == ["diverged"]


def test_what_is_far_beyond_the_control_is_told_in_words_and_crosses() -> None:
    wild = cell("plain", [3e5, 1e5], tuning={0.01: 2e5, 0.02: 1e5, 0.04: math.inf})
    bad = cell("norm", [1.5, 1.7], tuning={0.01: 3.0, 0.02: 3.2, 0.04: 3.5})
    found = compare(cell("rezero", [1.0, 1.1]), bad, wild)
    (axis,) = compare_plots.plot_differences(found).axes
    assert axis.get_xlim()[1] < 1
    assert [text.get_text() for text in axis.texts] == ["+199,999, undecided"]
    crosses = [panel.lines[-1] for panel in compare_plots.plot_rates(found).axes]
    assert {line.get_marker() for line in crosses} == {"x"}
    # Above 3.3, as all of plain's losses are more than ten times the median rule's best.
    assert [list(line.get_xdata()) for line in crosses] == [[0.04], [0.04], [0.01, 0.02, 0.04]]
    low, high = compare_plots.plot_curves(found).axes[0].get_ylim()
    assert 0 < low < 2 < high < 5


def test_entropies_of_a_text_are_labelled_lines_of_its_curves() -> None:
    text = load_config("configs/transformer_small.py").data
    bits = entropies.of_data(text)
    assert list(bits) == ["unigram", "bigram", "trigram"]
    assert entropies.of_data(load_config("configs/mlp.py").data) == {}
    found = compare(cell("rezero", [1.0]), cell("norm", [1.1]))
    found = replace(found, levels={"bigram": 2.41, "beyond": 9.0})
    for axis in compare_plots.plot_curves(found).axes:
        assert [label.get_text() for label in axis.texts] == ["bigram\n2.41"]
        assert any(set(line.get_ydata()) == {2.41} for line in axis.lines)


def test_the_time_of_a_comparison_is_that_of_all_updates() -> None:
    lost = cell("plain", [], seconds=math.nan)
    found = compare(cell("rezero", [1.0, 1.1]), cell("norm", [1.5], seconds=2.0), lost)
    assert found.seconds == 100 * (0.5 * (2 + 3) + 2.0 * (1 + 3))


def test_runs_differ_in_rule_depth_rate_and_seed_alone() -> None:
    plan = Plan("configs/mlp.py:epochs=2", ("model.width=8",), ["rezero"], [2], 2, 3, 2.0, 1)
    job = plan.job("norm", 4, 0.02, 7)
    config = job.load()
    assert (config.model.residual, config.model.depth, config.model.width) == ("norm", 4, 8)
    assert (config.optim.learning_rate, config.seed, config.train.epochs) == (0.02, 7, 2.0)
    assert plan.grid("norm", 4).middle == 0.01


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rules=rezro"], 'did you mean "rezero"'),
        (["--depths=2,x"], "--depths=2,x"),
        (["--factor=1"], "not above 1"),
        (["--seeds=0"], "not positive"),
        (["--config=mlp.py"], "not a file of configs/"),
        (["--config.seed=3"], "leave it out"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config=configs/mlp.py", "--rules=rezero", "--depths=2", f"--out={tmp_path}/out"]
    assert main(["compare", *given, *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_comparison_from_beginning_to_end(tmp_path: Path) -> None:
    flags = ["--config=configs/mlp.py:epochs=1,width=8", "--rules=rezero,plain", "--depths=2"]
    flags += ["--seeds=2", "--factor=4", "--jobs=2", "--target=2.2", f"--out={tmp_path}"]
    assert main(["compare", *flags]) == 0
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert [len(found["losses"]) for found in saved["cells"]] == [2, 2]
    before = (tmp_path / "report.md").read_text()
    assert main(["compare", *flags]) == 0  # has nothing left to train
    assert (tmp_path / "report.md").read_text() == before
