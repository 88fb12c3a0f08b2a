"""The comparison of rules: its grids of learning rates, its intervals and verdicts, its report."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from experiments import report, running, sweep
from experiments.__main__ import main
from experiments.compare import FARTHEST, Grid, Plan, best_of
from experiments.comparison import (
    FLOPS,
    LOSS,
    SECONDS,
    TARGET,
    TUNING,
    UPDATES,
    Cell,
    Comparison,
    curve_name,
    reached,
    seconds_of,
)
from experiments.results import Curve, Made, Results, Row
from experiments.statistics import NOT_SIGNIFICANT, Censored
from rezero_jax.errors import UserError
from tests.test_experiments import in_process

GRID = Grid(0.01, 2.0, range(-1, 2))
RATES = {0.01: 1.0, 0.02: 0.5, 0.04: None}


def tuned(loss_of: dict[int, float] | None = None, best: int = 0) -> dict[int, float]:
    """The losses that a search ends with, where the loss of k is (k - best)**2."""
    losses: dict[int, float] = {}
    while new := GRID.untried(losses):
        for k in new:
            losses[k] = (loss_of or {}).get(k, float((k - best) ** 2))
    return losses


@pytest.mark.parametrize("best", [-5, 0, 4])
def test_a_grid_grows_until_the_best_rate_is_bracketed(best):
    losses = tuned(best=best)
    assert best_of(losses) == best
    assert {best - 1, best + 1} <= losses.keys()
    assert len(losses) <= 3 + abs(best) + 1
    assert [GRID.rate(k) for k in range(-2, 3)] == [0.0025, 0.005, 0.01, 0.02, 0.04]


def test_rates_that_diverge_bound_the_grid():
    losses = tuned({1: math.inf, 2: math.inf}, best=7)
    assert best_of(losses) == 0
    assert 2 not in losses
    losses = tuned({k: math.inf for k in range(-3, 2)}, best=-5)
    assert best_of(losses) == -5
    hopeless = tuned({k: math.inf for k in range(-99, 99)})
    assert best_of(hopeless) is None
    assert min(hopeless) == -FARTHEST
    assert Grid(0.01, 2.0, [0]).untried({0: 1.0}) == []  # --rates=1: the config's rate


def rows(
    rule: str,
    losses: list[float | None],
    to_target: list[float] | None = None,
    tuning: dict[float, float | None] = RATES,
    flops: float = 1000,
    seconds: float = 0.5,
    depth: int = 8,
) -> list[Row]:
    """The rows of a rule, of whose seeds each takes 40 updates to a loss of 2.5 unless given."""
    found = [
        Row(rule, LOSS, (loss,), size=depth, rate=rate, seed=TUNING)
        for rate, loss in tuning.items()
    ]
    if losses:
        times = tuple(to_target or [40.0] * len(losses))
        found.append(Row(rule, LOSS, tuple(losses), size=depth, rate=0.02))
        found.append(Row(rule, f"{TARGET} 2.5", times, size=depth))
        numbers = {UPDATES: 100, FLOPS: flops, SECONDS: seconds}
        found += [Row(rule, name, (value,), size=depth) for name, value in numbers.items()]
    return found


def compare(*of_rules: list[Row]) -> Comparison:
    """The comparison of rules, the first of which is the control, whose curves fall steadily."""
    every = [row for of_rule in of_rules for row in of_rule]
    curve = Curve(list(range(1, 101)), [3.0 - 0.01 * step for step in range(1, 101)])
    curves = {
        curve_name(row.setting, row.size or 0, seed): curve
        for row in every
        if row.metric == LOSS and row.seed < TUNING
        for seed, draw in enumerate(row.draws)
        if draw is not None
    }
    made = Made("python -m experiments compare", "cpu", 0.0, ["python train.py"])
    return Comparison(Results("comparison", "", every, curves=curves, made=made))


def second(comparison: Comparison) -> Cell:
    return comparison.cells[1]


def test_differences_are_the_paired_t_tests():
    one, other = [1.0, 1.3, 1.1, 0.9], [1.2, 1.6, 1.2, 1.3]
    found = compare(rows("rezero", other), rows("norm", one))
    difference = found.difference(second(found))
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert difference.sample.interval() == pytest.approx(tuple(expected))
    assert difference.verdict == "lower"
    back = compare(rows("rezero", one), rows("norm", other))
    assert back.difference(second(back)).verdict == "higher"
    assert back.difference(back.cells[0]) is None


def test_many_differences_need_a_wider_interval():
    control, baseline = [1.0, 1.1, 0.95], [1.2, 1.25, 1.08]
    alone = compare(rows("rezero", control), rows("norm", baseline))
    assert alone.difference(second(alone)).verdict == "higher"
    rest = [rows(f"rule{i}", baseline) for i in range(9)]
    among = compare(rows("rezero", control), rows("norm", baseline), *rest)
    difference = among.difference(second(among))
    assert difference.verdict == NOT_SIGNIFICANT
    assert difference.sample.interval()[0] > 0
    broken = rows("plain", [5e3, 6e3, 7e3])
    dunnett = compare(rows("rezero", control), rows("norm", baseline), broken).many_against_one(8)
    assert dunnett == {"norm": NOT_SIGNIFICANT}


def test_the_noise_floor_is_of_a_usual_cell_and_diverged_runs_are_not_compared():
    a, b, broken = [1.0, 1.2, 1.1], [2.0, 2.6, 2.1], [3e5, 1e5, 2e5]
    noise = compare(rows("rezero", a), rows("norm", b), rows("plain", broken)).noise
    assert np.isclose(noise, np.std(b, ddof=1))
    assert compare(rows("rezero", [1.0])).noise is None
    lost = compare(rows("rezero", [1.0, 1.1]), rows("plain", [1.0, None]))
    assert lost.difference(second(lost)) is None
    assert report.loss_and_difference(lost, second(lost)) == "diverged in 1 of 2"


def test_at_equal_cost_a_more_expensive_rule_is_read_earlier():
    found = compare(rows("rezero", [1.0]), rows("norm", [1.0], flops=2000, seconds=2.0))
    ours, theirs = found.cells
    for cell, what, last in ((ours, "flops", 100), (theirs, "flops", 50), (theirs, "seconds", 25)):
        mean = np.mean([3.0 - 0.01 * step for step in range(last - 4, last + 1)])
        assert np.isclose(found.equal(cell, what), mean)
    assert seconds_of(found.cells) == 100 * (0.5 * (1 + 3) + 2.0 * (1 + 3))
    assert reached(found.cells[0].curves[0], 2.5) == 52  # the mean of updates 48 to 52


def test_times_to_the_target_are_ratios_of_pairs():
    ones = [1.0] * 4
    control = rows("rezero", ones, [40.0, 50.0, 60.0, 45.0])
    slow, late = [80.0, 105.0, 118.0, 90.0], [60.0, 90.0, Censored(100.0), 70.0]
    found = compare(control, rows("norm", ones, slow), rows("plain", ones, late))
    times = found.times(second(found))
    logs = np.log(np.divide(slow, control[-4].draws))
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert np.allclose(np.log(times.sample.interval()), expected)
    assert times.verdict == "higher"
    assert found.times(found.cells[2]).verdict == NOT_SIGNIFICANT
    assert found.times(found.cells[0]) is None
    head, _, *lines = report.by_depth(found, report.to_target).splitlines()
    assert head == "| rule | 8 layers |"
    assert lines[1].endswith(f": {times.sample.shown}, higher |")
    # sqrt(sqrt(60 / 40 x 90 / 50 x 100 / 60 x 70 / 45)), and Fisher's 3 of 4 against 4 of 4.
    bound = ">= 1.627 (1 of 4 right-censored), not significant (p = 1)"
    assert lines[2] == f"| `plain` | reached in 3 of 4 runs: {bound} |"
    lost = compare(rows("rezero", [1.0], [Censored(100.0)]), rows("norm", [1.0]))
    assert lost.times(second(lost)) is None


def test_runs_differ_in_rule_depth_rate_and_seed_alone():
    plan = Plan("mlp.py:epochs=2", ("model.width=8",), ["rezero"], [2], 2, 3, 2.0, 1)
    config = plan.job("norm", 4, 0.02, 7).load()
    assert (config.model.residual, config.model.depth, config.model.width) == ("norm", 4, 8)
    assert (config.optim.learning_rate, config.seed, config.train.epochs) == (0.02, 7, 2.0)
    assert plan.grid("norm", 4).middle == 0.01
    frozen, ours = (plan.job(rule, 8, 0.01, 0) for rule in ("rezero_frozen", "rezero"))
    assert frozen.name != ours.name
    one, other = frozen.load().to_dict(), ours.load().to_dict()
    rates = [config["optim"]["alpha"].pop("learning_rate") for config in (one, other)]
    assert (rates, one) == ([0.0, None], other)


def test_the_report_shows_every_rule_and_reads_back(tmp_path):
    found = compare(rows("rezero", [1.0, 1.1]), rows("norm", [1.5, 1.7]), rows("plain", []))
    back = Comparison(Results.read(found.results.write(tmp_path)))
    assert [repr(vars(cell)) for cell in back.cells] == [repr(vars(cell)) for cell in found.cells]
    assert [cell.is_bracketed for cell in back.cells] == [True, True, False]
    text = report.write_comparison(back, tmp_path).read_text()
    for part in ("rezero", "norm", "plain", "none of 0.01 to 0.04", "noise floor"):
        assert part in text
    for name in ("differences.png", "rates.png", "curves.svg"):
        assert (tmp_path / name).stat().st_size > 0
    one, other, last = report.comparison_summary(found).splitlines()[2:]
    assert one == "| `rezero` | 1.05 | 1.00x, 1.00x |"
    assert other.startswith("| `norm` | 1.6: 0.55 (-0.085 to 1.2), not significant |")
    assert last == "| `plain` | diverged |  |"


def test_a_comparison_at_one_rate_says_that_nothing_was_tuned():
    one = compare(*(rows(rule, [2.0, 2.1], tuning={0.02: 2.0}) for rule in ("rezero", "plain")))
    assert report.plots_of(one) == ["differences", "curves"]
    assert "No learning rate was tuned" in report.comparison_report(one, "net")
    assert "*" not in report.by_depth(one, report.TABLES["Best learning rate"])


def test_a_comparison_from_beginning_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "start", in_process)
    flags = ["--config=configs/mlp.py:epochs=1,width=8", "--rules=rezero", "--depths=2"]
    flags += ["--rates=2", "--factor=4", "--seeds=1", "--target=2.2", f"--out={tmp_path}"]
    flags += ["--config.optim.learning_rate=0.16"]
    assert main(["compare", *flags]) == 0
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert saved["made"]["device"]
    before = (tmp_path / "report.md").read_text()
    assert main(["compare", *flags]) == 0  # nothing is left to train
    assert (tmp_path / "report.md").read_text() == before


def test_a_config_of_another_size_is_refused(capsys):
    assert main(["compare", "--config=configs/mlp.py:smoke", "--rules=rezero", "--depths=4,8"]) == 2
    assert "sets the depth to 4 regardless of --depths; leave out" in capsys.readouterr().err


def test_a_sweep_from_beginning_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "start", in_process)
    flags = ["sweep", "--config=configs/mlp.py:epochs=1,width=8,depth=2", f"--out={tmp_path}"]
    flags += ["--grid", "model.residual=rezero"]
    assert main([*flags, "optim.learning_rate=1e-5,0.16"]) == 0
    table = (tmp_path / "sweep.md").read_text().splitlines()[2:]
    assert table[0] == "| model.residual | optim.learning_rate=1e-5 | optim.learning_rate=0.16 |"
    worse, best = table[2].split(" | ")[1:]
    assert float(worse) > float(best.strip("* |"))
    assert best.startswith("**")
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert lines[0].startswith("model.residual,optim.learning_rate,seed,status,")
    assert [line.split(",")[:4] for line in lines[1:]] == [
        ["rezero", "1e-5", "0", "finished"],
        ["rezero", "0.16", "0", "finished"],
    ]
    assert "[2/2] residual=rezero-learning_rate=0.16-seed=0: done" in capsys.readouterr().out


def test_a_sweep_draws_each_field_of_its_grid_and_refuses_others(capsys):
    grid = sweep.Grid.of(["a=1", "b=x,y", "c=2,3,4", "d=1,2"])
    losses = {point: [float(len(point[1] * 2)), 2.5] for point in grid.points}
    losses["1", "x", "2", "1"] = [1.0, None]
    losses["1", "y", "4", "2"] = [0.5, 0.5]
    shown = sweep.table(grid, losses)
    assert "| 1 | x | 2 | diverged in 1 of 2 | 2.25 (2 to 2.5) |" in shown
    assert shown.endswith("| 1 | y | 4 | 2.25 (2 to 2.5) | **0.5** (0.5 to 0.5) |")
    (axis,) = sweep.plot(grid, losses).axes
    labels = axis.get_legend_handles_labels()[1]
    assert labels == [f"b={b}, c={c}" for b in "xy" for c in "234"]
    for wrong in (["a"], ["a="], ["a=1,,2"], ["a=1", "a=2"]):
        with pytest.raises(UserError, match="--grid"):
            sweep.Grid.of(wrong)
    flags = ["sweep", "--config=configs/mlp.py", "--grid", "model.widht=8"]
    assert main(flags) == 2
    assert "model.widht" in capsys.readouterr().err
