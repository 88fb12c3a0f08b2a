"""The paper by command: known numbers, result files, and runs, of which most are stand-ins."""

import argparse
import csv
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import accelerator, entropies, fc, gpu, initialisation, jobs, running, spectra, toy
from experiments.__main__ import EXPERIMENTS, SCALES, _jobs, main
from experiments.jobs import planned
from experiments.published import MARKS, SOURCES, STATUSES, Claim, curve, published
from experiments.results import COLUMNS, Curve, Made, Results, Row
from experiments.statistics import Censored
from launch import supervisor
from rehearsal.topologies import NoCompiler
from rezero_jax.analysis.singular_values import singular_values
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.files import write_json
from rezero_jax.runs.reader import Run
from rezero_jax.training import loop

# Settings that no experiment of ours has: results that the paper copies from others, and two curves
# whose labels do not fit its own table.
ONLY_THEIRS = ("Char-TX", "the curve labelled")


def status_of(argv):
    """The exit status of a command line."""
    try:
        return main(argv)
    except SystemExit as error:
        return error.code


# ---- The toy model, which has closed forms


def test_the_toy_gradients_are_those_of_their_costs():
    soft = (partial(toy.soft_cost, layers=7), partial(toy.soft_gradient, layers=7))
    for cost, gradient in ((toy.cost, toy.gradient), soft):
        for alpha, w in ((0.0, 0.5), (0.3, 2.5), (0.9, -1.0), (1.1, 0.3)):
            step = 1e-6
            slopes = [
                cost(alpha + step, w) - cost(alpha - step, w),
                cost(alpha, w + step) - cost(alpha, w - step),
            ]
            expected = np.array(slopes) / (2 * step)
            np.testing.assert_allclose(gradient(alpha, w), expected, rtol=1e-5, atol=1e-4)
    learned = np.mean([((1 + 0.3 * 2.5) ** 5 * x - 50 * x) ** 2 for x in toy.INPUTS])
    assert toy.cost(0.3, 2.5) == pytest.approx(learned, rel=1e-12)


def test_the_toy_results_are_the_papers():
    results = Results("toy", "paper")
    toy.measure(results, {})
    rows = {(row.setting, row.metric): row.mean for row in results.rows}
    for start, w in ((0.5, 1.15), (1.5, 1.66)):
        assert round(rows[f"w0 = {start}", "w at the end"], 2) == w
    assert round(rows["solutions", "alpha w"], 1) == 1.2
    updates = [rows[f"w0 = {start}", "updates"] for start in toy.STARTS]
    assert updates == [703, 158, 62, 32, 20]
    assert [claim.status for claim in results.claims] == ["replicated"]


def test_without_a_gate_the_first_update_sets_the_largest_rate():
    """From w = 1 it may not pass -3: rate L 2^(L-1) mean(x_0) = 4, as the slope of ln cosh is 1."""
    for layers in (20, 30):
        expected = 4 / (layers * 2.0 ** (layers - 1) * 1.4)
        found = toy.largest_stable_rate(layers, gated=False)
        assert found == pytest.approx(expected, rel=0.011)
        assert toy.largest_stable_rate(layers, gated=True) > 100 * found


# ---- Networks at initialisation


def test_nets_are_those_of_the_experiment_on_jacobians():
    """The sum of squares without a decomposition is that of the singular values."""
    found = spectra.mean_squares("ReZero", 2, 2)
    for seed, squares in enumerate(found):
        key = jax.random.key(seed)
        net = spectra.encoder("rezero", 2, key)
        x = jax.random.normal(jax.random.fold_in(key, 1), (1, 4, 16))
        assert squares == pytest.approx((singular_values(net, x) ** 2).mean(), rel=1e-5)


def test_layer_norm_and_uniform_attention_lose_what_algebra_says():
    values = spectra.layer_norm(3)
    # Of each token the mean is lost for good, and the direction of x but for epsilon.
    assert (values < 1e-5).sum() == 3 * 4 + ((values > 1e-7) & (values < 1e-5)).sum()
    assert ((values < 1e-3).sum(1) == 8).all()
    assert ((spectra.attention(3, uniform=True) > 1e-5).sum(1) == 16).all()
    assert ((spectra.attention(3, uniform=False) > 1e-5).sum(1) > 16).all()


def test_means_of_ten():
    means = initialisation.means_of_ten(np.arange(1000))
    assert (np.diff(means) >= 0).all()
    assert means.mean() == pytest.approx(499.5, abs=3)
    assert means.std() == pytest.approx(1000 / np.sqrt(12 * 10), rel=0.03)


def test_a_number_of_the_notebook_is_judged_by_the_share_of_means_beyond_it():
    """ReZero, 12 layers: 1.059. With m of 1,000 means beyond, the two-sided share is m / 500."""

    def judged(setting, low, high, m):
        results = Results("initialisation", "paper")
        means = np.array([low] * (1000 - m) + [high] * m)
        initialisation.judge_notebook(results, setting, means, 1000)
        return results.claims[0].holds

    found = [judged("ReZero, 12 layers", 1.0, 1.1, m) for m in (500, 25, 24, 5, 4, 0)]
    assert found == [True, True, None, None, False, False]
    zero = [judged("post-norm, 128 layers", 0.0, 0.3, 1000 - m) for m in (0, 10, 25)]
    assert zero == [False, None, True]


def test_equation_7_is_judged_by_slopes():
    layers = np.array(initialisation.LAYERS)
    bound, power = 2.0**-layers / layers, 10.0 * layers**-2.0
    for residual, rezero, holds in ((bound, power, True), (power, bound, False)):
        curves = {"residual": Curve([], residual), "ReZero": Curve([], rezero)}
        results = Results("initialisation", "paper", curves=curves)
        initialisation.judge_equation_7(results)
        assert [one.holds for one in results.claims] == [holds] * 2


# ---- The paper's numbers


def test_the_papers_numbers_agree_with_each_other():
    with (Path(toy.__file__).parent / "published.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = [(row["experiment"], row["setting"], row["quantity"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row["experiment"] for row in rows} <= {*EXPERIMENTS, "notebook_transformer"}
    assert {row["source"].split()[0] for row in rows} == set(SOURCES)
    for row in rows:
        marks = [word for word in row["source"].split() if word in MARKS]
        shown = published(row["experiment"])[row["setting"], row["quantity"]].shown
        assert shown.endswith(")") == bool(marks), shown
    assert published("fc")["FC", "times ReZero's epochs to 1.2"].shown == "7.8 (derived, digitised)"
    assert published("resnet")["ResNet-56", "error %"].shown == "6.27 ± 0.06"
    assert curve("fc", "FC", "loss of epoch") == [(50, 0.76), (100, 0.25), (150, 0.096)]

    table = published("transformer12")
    for baseline in ("Post-Norm + warm-up", "Pre-Norm"):
        reference = table[baseline, "iterations to the target"].value
        for (setting, metric), number in table.items():
            if metric == f"speed-up over {baseline}":
                steps = table[setting, "iterations to the target"].value
                assert reference / steps == pytest.approx(number.value, abs=0.006)
    for (setting, metric), number in published("fc").items():
        if metric.startswith("times ReZero's "):
            epochs = metric.removeprefix("times ReZero's ")
            of = [published("fc")[name, epochs].value for name in (setting, "FC + ReZero")]
            assert of[0] / of[1] == pytest.approx(number.value, rel=0.02)


# ---- Result files


def test_results_come_back_from_their_file(tmp_path):
    spread = Curve.of_runs([([1, 2, 3], [1.0, 2.0, 3.0]), ([1, 2], [3.0, 6.0])])
    assert (spread.x, spread.y) == ([1, 2], [2, 4])
    assert spread.half == pytest.approx([12.7062, 2 * 12.7062], rel=1e-5)  # t, one degree
    rows = [
        Row("FC", "epochs to 1.2", (30.0, Censored(32.0))),
        Row("FC", "loss", (None, 1.0), reduced=True, log=True, seed=1),
        Row("rezero", "test loss", (1.5,), size=8, rate=0.01, seed=100),
        Row("rezero", "test loss", (1.6, 1.7), size=8, rate=0.01),
    ]
    claim = Claim("so is this", "UAI 1", True, "seen", 5, (1.0, 2.0), weak=True)
    made = Made("python -m experiments fc", "8 x TPU v5 lite", 3700.4, ["run"])
    curves = {"FC": spread, "x": Curve([1.0], [math.nan])}
    results = Results("fc", "cpu", rows, [claim], curves, ["a remark"], {"unigram": 4.5}, made)
    back = Results.read(results.write(tmp_path))
    assert back.curves.pop("x").y == [None]  # JSON has no NaN
    results.curves.pop("x")
    assert back == results
    assert [type(draw) for draw in back.rows[0].draws] == [float, Censored]
    assert math.isnan(
        Results.read(Results("fc", "cpu", [Row("FC", "ratio", (math.nan,))]).write(tmp_path))
        .rows[0]
        .draws[0]
    )
    shown = [Row("ResNet-56", "error %", (6.0, 7.0), reduced=reduced) for reduced in (False, True)]
    papers = map(Results("resnet", "cpu", shown).paper, shown)
    assert [paper and paper.text for paper in papers] == ["6.27", None]
    # A data frame needs nothing but columns and records.
    content = json.loads(results.write(tmp_path).read_text())
    assert tuple(content["columns"]) == COLUMNS
    assert content["records"][1] == ["FC", None, None, "epochs to 1.2", 1, 32.0, "right-censored"]
    assert content["records"][2][-2:] == [None, "diverged"]


def test_a_run_that_experiments_share_is_the_same_run():
    shared = {}
    for name in EXPERIMENTS:
        for scale in SCALES:
            for job in planned(name, scale):
                assert shared.setdefault((scale, job.name), job)[2:4] == job[2:4], job.name


# ---- Every experiment, on stand-ins for its runs


class Ended:
    """A process that is over."""

    def __init__(self, status=0):
        self.status = status

    def poll(self):
        return self.status

    def send_signal(self, signum):
        pass


SPEED = {"rezero": 8.0, "norm": 1.5, "plain": 1.0, "residual": 0.7, "frozen": 0.5}


def stand_in(command, cores, log):
    """Instead of train.py: writes the run that the command asks for, without training."""
    given = dict(part.removeprefix("--").split("=", 1) for part in command[2:])
    overrides = [
        f"{k.removeprefix('config.')}={v}" for k, v in given.items() if k.startswith("config.")
    ]
    if "mode" in given:
        log.write_text(json.dumps({"step": 1, "eval/bits_per_byte": 1.25}))
        return Ended()
    config = load_config(given["config"], overrides)
    folder = Path(given["workdir"])
    folder.mkdir(parents=True)
    write_json(folder / "config.json", json.loads(config.to_json()))
    kinds = {"device": "TPU v5 lite", "machine": "TPU host, 8 cores", "devices": 8, "seconds": 0.0}
    write_json(folder / "environment.json", kinds)
    rule = config.model.residual
    speed = SPEED.get("frozen" if config.optim.alpha.learning_rate == 0 else rule, 1.2)
    layers = 8 if config.model.name == "resnet" else config.model.depth
    epochs = int(config.train.epochs or 0)
    lines = []
    for i in range(1, epochs + 1 if epochs else 21):
        step = 1200 * i if epochs else config.train.steps * i // 20
        loss = 3 * math.exp(-0.025 * speed * i)
        line = {"step": step, "epoch": float(i), "train/loss": loss, "train/epoch_loss": loss}
        line |= {"train/accuracy": 1 - loss / 4, "eval/loss": loss, "eval/accuracy": 1 - loss / 4}
        line |= {"train/bits_per_byte": 1 + loss, "eval/bits_per_byte": 1 + loss}
        for layer in range(layers if rule == "rezero" else 0):
            # Layer l peaks at line layers - l, at twice what it has at the end, 1 / layers.
            late = max(i - (layers - layer), 0)
            line[f"alpha/{layer}"] = (1 + math.exp(-late)) / layers if late else 0.1 / layers
        lines.append(line)
        if loss <= (config.train.until_loss or 0):
            break
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = {"status": "finished", "steps": lines[-1]["step"], "seconds": 1.0, "parameters": 7}
    write_json(folder / "final.json", final | lines[-1])
    log.write_text("finished")
    return Ended()


@pytest.fixture
def stand_ins(monkeypatch):
    """Runs are made up; the networks of those that were trained have singular values of 1."""
    monkeypatch.setattr(running, "start", stand_in)
    monkeypatch.setattr(spectra, "after", lambda run, step: np.ones((2, 3)))
    monkeypatch.setattr(spectra, "untrained", lambda run, seeds: [np.ones((2, 3)) for _ in seeds])
    monkeypatch.setattr(spectra, "resnets", lambda config, seeds: list(seeds))
    monkeypatch.setattr(spectra, "with_batch_statistics", lambda net: net)
    monkeypatch.setattr(spectra, "of_images", lambda net: np.ones((2, 3)))
    monkeypatch.setattr(entropies, "of_run", lambda folder: {"unigram": 4.5, "bigram": 3.5})
    values = np.geomspace(1, 1e-8, 64)
    some = {
        "mean_squares": lambda rule, depth, count: np.linspace(0, 2, count),
        "layer_norm": lambda count: np.tile(values, (count, 1)),
        "attention": lambda count, uniform: np.tile(values, (count, 1)),
    }
    for name, make in some.items():
        monkeypatch.setattr(spectra, name, make)
    monkeypatch.setattr(running.time, "sleep", lambda seconds: None)


def measured(name, scale, folder):
    """The results of an experiment on two stand-ins for each run."""
    todo = [job.with_seed(seed) for job in planned(name, scale) for seed in (0, 1)]
    done = list(running.run_all(todo, folder, 8))
    assert sorted(job.name for job, _ in done) == sorted(job.name for job in todo)
    assert all(sentence is None for _, sentence in done)
    runs = {}
    for job in todo:
        runs.setdefault(job.setting, []).append(Run.read(folder / job.name))
    results = Results(name, scale)
    EXPERIMENTS[name].measure(results, runs)
    return results


@pytest.mark.slow
def test_every_number_of_the_paper_has_ours_beside_it(stand_ins, monkeypatch, tmp_path):
    names = [f"{rule}, {layers} layers" for rule in spectra.RULES for layers in (12, 128)]
    names += [f"post-norm, {layers} layers" for layers in spectra.FIGURE]
    ones = {name: [np.ones((1, 64))] for name in names}
    monkeypatch.setattr(spectra, "at_initialisation", lambda scale: ones)
    for name in EXPERIMENTS:
        results = measured(name, "paper", tmp_path)
        rows = {(row.setting, row.metric): row.mean for row in results.rows}
        statuses = [claim.status for claim in results.claims]
        theirs = {key for key in published(name) if not key[0].startswith(ONLY_THEIRS)}
        assert theirs <= rows.keys(), name
        assert set(statuses) <= set(STATUSES)
        assert not any(row.reduced for row in results.rows) or name == "jacobian"
        if name == "fc":
            for setting, rule in (("FC", "plain"), ("FC + Norm", "norm"), ("FC + Res", "residual")):
                ratio = rows[setting, "times ReZero's epochs to 0.1"]
                assert ratio == pytest.approx(8 / SPEED[rule])
            # 8, 5.3 and 11.4 times in both pairs.
            assert [claim.holds for claim in results.claims] == [
                *[True] * 3,  # faster
                *(False, True, False, True),  # 7 to 15 times faster
                *[True] * 2,
            ]
            # The control has 3 exp(-0.025 / 2 * 20) in ReZero's 20th and last epoch.
            assert "over ReZero: 3.75" in results.claims[-1].evidence
            assert len(results.remarks) == len(fc.TARGETS)
        if name == "notebook_resnet":
            # ReZero's accuracy is ahead by 3 / 4 (exp(-0.0175) - exp(-0.2)) in both pairs.
            assert results.claims[0].evidence == "points that ReZero is ahead: 12.29"
        if name == "alphas":
            assert rows["alpha = 0, 12 layers", "times L"] == pytest.approx(1)
            found = [claim for claim in results.claims if claim.text.startswith("64 layers")]
            assert [claim.status for claim in found[2:]] == ["replicated"] * 4
        if name == "transformer12":
            # 1 + 3 exp(-0.2 i) <= 1.2 from i = 14 on, an evaluation every 1,200 steps.
            steps = rows["ReZero alpha = 0", "iterations to the target"]
            assert steps == 1200 * math.ceil(5 * math.log(15))
        if name == "resnet":
            # 1 - 3 exp(-0.2 i) / 4 >= 0.8 from i = 7 on.
            epochs = rows["ResNet-110 + ReZero", "epochs to 80 %"]
            assert epochs == math.ceil(5 * math.log(15 / 4))


def test_a_report_is_written_once_all_runs_are_done(stand_ins, monkeypatch, tmp_path, capsys):
    argv, folder = smoke("fc", tmp_path, "--jobs=4"), tmp_path / "smoke"
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {folder / 'report.md'}"
    assert (folder / "fc.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "fc.svg").read_text()
    results = Results.read(folder / "fc.json")
    assert results.scale == "smoke"
    assert {claim.status for claim in results.claims} == {"not tested"}
    text = (folder / "report.md").read_text()
    for part in ("](fc.png)", "--scale=smoke", "8 x TPU v5 lite"):
        assert part in text
    # Everything is done: a second call starts nothing, and writes the same page.
    monkeypatch.setattr(running, "start", None)
    assert main(argv) == 0
    assert (folder / "report.md").read_text() == text
    capsys.readouterr()
    assert main([*argv, "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines if line[:1] == ["fc"]] == ["done"] * 5 + ["0"]


def test_the_control_is_the_shallowest_net_with_its_gates_frozen():
    for name in ("depth", "transformer_deep"):
        control = next(j for j in planned(name, "cpu") if "frozen" in j.setting).load()
        assert control.optim.alpha.learning_rate == 0.0
        assert control.model.residual == "rezero"
        assert not control.model.alpha_init  # 0, or None for the rule's own
        assert control.model.depth == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if planned(name, "cpu")])
def test_baselines_that_diverge_at_once_are_results(name, stand_ins, monkeypatch, tmp_path):
    if name in ("depth", "jacobian"):
        pytest.skip("has no baselines")

    def is_ours(setting):
        ours = ("ReZero", "ReZero alpha = 0", "alpha = 0")
        return setting.split(" + ")[-1].split(",")[0] in ours

    settings = {job.with_seed(0).name: job.setting for job in planned(name, "cpu")}

    def diverging(command, cores, log):
        process = stand_in(command, cores, log)
        folder = Path(next(p for p in command if p.startswith("--workdir=")).partition("=")[2])
        if not is_ours(settings[folder.name]):
            (folder / "metrics.jsonl").write_text("")
            end = {"status": "diverged", "steps": 5, "seconds": 1.0, "parameters": 7}
            write_json(folder / "final.json", end)
            process.status = running.DIVERGED
        return process

    monkeypatch.setattr(running, "start", diverging)
    assert main([name, f"--out={tmp_path}"]) == 0
    reached = {True: 0, False: 0}
    for row in Results.read(tmp_path / f"cpu/{name}.json").rows:
        if row.metric != "million parameters":
            reached[is_ours(row.setting)] += row.reached
    assert reached[False] == 0
    assert reached[True] > 0


# ---- Running


def smoke(name, folder, *flags):
    return [name, "--scale=smoke", f"--out={folder}", *flags]


def in_process(command, cores, log):
    """Instead of a process with train.py: trains here, where programs are compiled once."""
    given = [text.removeprefix("--") for text in command[2:]]
    fields = [text.removeprefix("config.") for text in given if text.startswith("config.")]
    flags = dict(text.split("=", 1) for text in given)
    loop.train(load_config(flags["config"], [*fields, "mesh.data=1"]), flags["workdir"])
    log.write_text("finished")
    return Ended()


def test_one_experiment_from_beginning_to_end(monkeypatch, tmp_path):
    monkeypatch.setattr(running, "start", in_process)
    assert main(smoke("depth", tmp_path)) == 0
    results = Results.read(tmp_path / "smoke/depth.json")
    sizes = results.row("8 layers", "parameters").draws
    assert sizes == (64 * 8 + 8 + 8 * (8 * 8 + 8 + 1) + 8 * 10 + 10,)
    assert all(row.reached == 1 for row in results.rows)
    assert "## The depth of" in (tmp_path / "smoke/report.md").read_text()


def test_a_signal_is_passed_to_the_runs_and_no_more_are_started(monkeypatch, tmp_path, capsys):
    """SIGTERM comes while the first of two runs trains: it saves, and the second never starts."""
    signals, started, polls = [], [], []

    class Training(Ended):
        def poll(self):
            polls.append(signals)
            assert len(polls) < 9
            return 128 + signals[0] if signals else signal.raise_signal(signal.SIGTERM)

        def send_signal(self, signum):
            signals.append(signum)

    monkeypatch.setattr(running, "start", lambda *args: started.append(args) or Training())
    assert main(smoke("depth", tmp_path, "--jobs=1")) == 128 + signal.SIGTERM
    assert "the same command resumes them" in capsys.readouterr().err
    assert signals[0] == signal.SIGTERM
    assert len(started) == 1


def test_missing_data_are_reported_once(monkeypatch, tmp_path, capsys):
    sentence = 'data set "digits" is not prepared; set TFDS_DATA_DIR'
    started = []

    def start(command, cores, log):
        started.append(command)
        log.write_text(f"downloading\ntrain.py: {sentence}\n")
        return Ended(2)

    monkeypatch.setattr(running, "start", start)
    assert main(["fc", *smoke("depth", tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count(sentence) == 1
    assert error.endswith("fc, depth\n")
    assert len(started) == 8
    assert (tmp_path / "smoke/report.md").exists()


def test_a_run_that_diverged_is_over_and_one_of_another_config_is_refused(
    stand_ins, tmp_path, monkeypatch, capsys
):
    job = planned("depth", "smoke")[0].with_seed(0)
    folder = tmp_path / "smoke/runs" / job.name
    stand_in(job.command(folder), frozenset(), tmp_path / "log")
    final = json.loads((folder / "final.json").read_text())
    write_json(folder / "final.json", final | {"status": "diverged"})
    assert jobs.status(job, folder).kind == "diverged"
    monkeypatch.setattr(running, "start", None)
    assert list(running.run_all([job], folder.parent, 1)) == [(job, None)]
    changed = json.loads((folder / "config.json").read_text())
    changed["optim"]["learning_rate"] = 0.5
    write_json(folder / "config.json", changed)
    assert main(smoke("depth", tmp_path)) == 2
    error = capsys.readouterr().err
    assert "optim.learning_rate" in error
    assert "--out" in error


def test_cores_are_shared_out_and_a_process_is_pinned_to_its_own(monkeypatch, tmp_path):
    core, log = min(os.sched_getaffinity(0)), tmp_path / "log"
    command = [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
    assert running.start(command, frozenset({core}), log).wait() == 0
    assert log.read_text().strip() == str({core})
    monkeypatch.setattr(supervisor.os, "sched_getaffinity", lambda pid: {3, 4, 5, 6, 7})
    assert supervisor.core_shares(1) == [{3, 4, 5, 6, 7}]
    assert supervisor.core_shares(2) == [{3, 4}, {5, 6, 7}]
    assert supervisor.core_shares(7) == [set()] * 7  # each may use all of them


def test_seeds_and_text_go_into_the_runs(stand_ins, tmp_path):
    text = tmp_path / "book.txt"
    text.write_bytes(bytes(range(1, 200)) * 100)
    assert main(smoke("transformer_deep", tmp_path, "--seeds=2", f"--text={text}")) == 0
    folders = sorted((tmp_path / "smoke/runs").glob("*/config.json"))
    configs = [json.loads(path.read_text()) for path in folders]
    assert [config["seed"] for config in configs] == [0, 1]
    flags = argparse.Namespace(scale="smoke", seeds=2, text=None)
    every = [(seed, job.setting) for seed in (0, 1) for job in planned("fc", "smoke")]
    assert [(int(job.name[-1]), job.setting) for job in _jobs("fc", flags)] == every
    assert all(config["data"]["path"] == str(text) for config in configs)
    results = Results.read(tmp_path / "smoke/transformer_deep.json")
    assert results.made.command.endswith("--scale=smoke --seeds=2 --text=book.txt")
    assert [row.draws for row in results.rows if row.metric == "bits per byte"] == [(1.25, 1.25)]


COMPARE = ["compare", "--config=configs/mlp.py", "--rules=rezero", "--depths=2"]
COORDINATES = ["coordinates", "--config=configs/mlp.py", "--rules=rezero", "--depths=2,8"]


def test_mistakes_are_reported_before_anything_is_written(capsys, tmp_path):
    for argv, words in (
        (["tyo"], '"toy"'),
        (["toy", "--scale=cpus"], '"cpu"'),
        (["toy", "--seeds=0"], "--seeds: 0"),
        (["toy", "--scale=paper", "--text=x"], "--text"),
        (["toy", "--text=nowhere"], "--text=nowhere"),
        ([*COMPARE, "--rules=rezro"], '"rezero"'),
        ([*COMPARE, "--depths=2,x"], "--depths"),
        ([*COMPARE, "--factor=1"], "--factor"),
        ([*COMPARE, "--config=mlp.py"], "--config: mlp.py"),
        ([*COMPARE, "--config.seed=3"], "--config.seed"),
        ([*COORDINATES, "--depths=2"], "--depths=2,8"),
        ([*COORDINATES[:-1], "--widths=8,x"], "--widths: x"),
        ([*COORDINATES, "--config=configs/mlp.py:smoke"], "depth"),
        ([*COORDINATES, "--steps=700"], "train.steps"),
    ):
        assert status_of([*argv, f"--out={tmp_path}"]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.campaign
@pytest.mark.slow
def test_all_at_smoke_scale(tmp_path):
    assert main(["all", "--scale=smoke", f"--out={tmp_path}", "--jobs=2"]) == 0
    for name in EXPERIMENTS:
        assert Results.read(tmp_path / f"smoke/{name}.json").rows


# ---- The command for a GPU


def test_the_gpu_command_predicts_by_flops_without_its_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accelerator, "plan", absent)
    short = {"one": "depth --scale=smoke --seeds=1", "two": [*gpu.CLAIMS["gpu"].values()][-1]}
    monkeypatch.setitem(gpu.CLAIMS, "gpu", short)
    assert main(["gpu", "--dry-run", f"--out={tmp_path}", "--minutes=1"]) == 0
    text = capsys.readouterr().out
    one, two = (line.split() for line in text.splitlines()[1:3])
    assert (one[1], one[-1]) == ("3", "yes")
    assert [*two[1:3], *two[-2:]] == ["18", "5,400", "in", "part"]
    assert "by FLOPs at 1.4% of the peak" in text


def absent(config, topology):
    raise NoCompiler("no compiler")


def test_a_config_that_does_not_fit_is_not_predicted_by_flops(monkeypatch):
    def too_large(config, topology):
        raise UserError("this run needs more memory")

    monkeypatch.setattr(accelerator, "plan", too_large)
    with pytest.raises(UserError, match="more memory"):
        accelerator.Prediction(accelerator.GPU).total(planned("depth", "smoke"))


def test_the_gpu_command_names_configs_that_exist():
    configs = [j.load() for t in gpu.CLAIMS["gpu"].values() for j in accelerator.jobs_of(t)[0]]
    resnets = [config for config in configs if config.model.name == "resnet"]
    assert [c.optim.schedule for c in resnets] == ["constant"] * 30


def test_after_its_time_the_gpu_command_starts_nothing(tmp_path, capsys):
    assert gpu._run(tmp_path, time.monotonic(), 1) == 0
    assert capsys.readouterr().out.count("not started") == len(gpu.CLAIMS["gpu"])


@pytest.mark.slow
def test_the_gpu_command_runs_and_resumes_at_smoke_size(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(gpu.CLAIMS, "gpu", {"One: it": "depth --scale=smoke --seeds=1"})
    assert gpu._run(tmp_path, time.monotonic() + 1, 1) == 0
    assert "all its runs are saved" in capfd.readouterr().out
    assert main(["gpu", f"--out={tmp_path}", "--jobs=1"]) == 0
    assert (tmp_path / "one-it/smoke/depth.json").exists()
    assert main(["gpu", f"--out={tmp_path}", "--jobs=1"]) == 0
    assert "started" not in capfd.readouterr().out.rpartition("One: it")[2]
