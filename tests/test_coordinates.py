"""The coordinate check: its measurement, slopes and verdicts, and its result for CompleteP."""

from itertools import islice

import jax
import numpy as np
import pytest

from experiments import coordinates
from experiments.__main__ import main
from experiments.coordinates import CHANGE, NONLINEARITY, measure, slopes_of
from experiments.results import Results
from rezero_jax import data
from rezero_jax.config import load_config
from rezero_jax.training.trainer import Trainer

SIZES = [2, 8, 32]
NAMES = ("kernel", "bias")


def of_power(power: float, noise: float = 0.0) -> np.ndarray:
    """Values (3 seeds, sizes) that grow as size**power, times exp(noise) in one of them."""
    values = np.repeat(np.array(SIZES, float)[None] ** power, 3, axis=0)
    values[0, -1] *= np.exp(noise)
    return values


def given_to_the_head(trainer, state):
    """The input of the head for the examples of the check."""
    model, seen = trainer.spec.model(state["params"], state["stats"]), []
    head = model.head
    model.head = lambda x: seen.append(x) or head(x)
    trainer.losses(model, trainer.examples(16))
    return np.asarray(seen[0], np.float64)


def test_the_slope_is_the_power_by_which_changes_grow():
    np.testing.assert_allclose(slopes_of(SIZES, of_power(0.5)), 0.5, rtol=1e-12)
    noisy = of_power(0.5, 0.3)
    expected = [np.polyfit(np.log(SIZES), np.log(values), 1)[0] for values in noisy]
    np.testing.assert_allclose(slopes_of(SIZES, noisy), expected, rtol=1e-12)
    assert not np.isfinite(slopes_of(SIZES, of_power(0.0, np.inf))).all()


def test_coordinates_are_those_of_the_last_layer_while_the_model_trains(monkeypatch):
    """Against what the head is given, in a network trained by hand with the same functions."""
    overrides = ["optim.learning_rate=0.1", "train.steps_per_dispatch=1"]
    config = load_config("configs/mlp.py:smoke,residual=pre_norm", overrides)
    trainer = Trainer(config, data.load(config.data, 0), jax.devices()[:1])
    monkeypatch.setattr(coordinates, "Trainer", lambda *args: trainer)
    found, _ = measure(config, 2, 2)

    state, batches, outputs = trainer.init(1), trainer.batches(0), []
    for _ in range(3):
        outputs.append(given_to_the_head(trainer, state))
        state, _ = trainer.dispatch(state, [next(batches)])
    x = np.stack(outputs)
    np.testing.assert_allclose(found[0, 1], np.abs(x).mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found[1, 1], np.abs(x - x[0]).mean(axis=(1, 2)), rtol=1e-4)
    assert found[1, 1, 1] > 0
    assert found[0, 0, 0] != found[0, 1, 0]  # of other initial weights


def test_nonlinearity_is_what_the_first_order_leaves_of_the_last_layers_change():
    """In a net made linear in its gates by hand: x_L = x + a relu(W x + b) in its last layer."""
    overrides = ["optim.learning_rate=0.1", "train.steps_per_dispatch=1"]
    config = load_config("configs/mlp.py:smoke,residual=rezero", overrides)
    _, found = measure(config, 3, 1)
    trainer = Trainer(config, data.load(config.data, 0), jax.devices()[:1])
    state, start = trainer.init(0), trainer.init(0)
    for batch in islice(trainer.batches(0), 3):
        state, _ = trainer.dispatch(state, [batch])
    before, after = (
        trainer.spec.model(s["params"], s["stats"]).trunk.layers()[-1] for s in (start, state)
    )
    x = given_to_the_head(trainer, start)  # what the last layer is given too, as all gates are 0

    def parts(block):
        kernel, bias = (np.asarray(getattr(block.linear, n)[...], np.float64) for n in NAMES)
        return float(block.rule.alpha[...]), np.maximum(x @ kernel + bias, 0)

    (alpha, f), (moved, changed) = parts(before), parts(after)
    assert alpha == 0  # so that the first-order change is that of alpha alone
    expected = np.linalg.norm(moved * (changed - f)) / np.linalg.norm(moved * f)
    np.testing.assert_allclose(found, [expected], rtol=1e-4)
    assert expected > 1e-3


def verdicts(remarks) -> list[str]:
    """The rule, metric and verdict of each sentence on a slope."""
    return [f"{text.split(' (')[0].rpartition(' ')[0]}: {text.split(', ')[-1]}" for text in remarks]


def slope(rule: str, metric: str, word: str) -> str:
    return f"{rule}: slope of the log {metric} over the log size: {word}"


def test_the_command_writes_its_numbers_and_its_plot(monkeypatch, tmp_path, capsys):
    def fake(config, steps, seeds):
        power = {"completep": 0.0, "pre_norm": 0.5}[config.model.residual]
        noise = 1 + 0.01 * np.arange(seeds)[:, None]
        change = noise * config.model.depth**power * np.arange(steps + 1)[None]
        return np.stack([change + 1, change]), noise[:, 0]

    monkeypatch.setattr(coordinates, "measure", fake)
    command = ["coordinates", "--config=configs/mlp.py", "--rules=pre_norm,completep"]
    assert main([*command, "--depths=2,8,32", "--steps=4", f"--out={tmp_path}"]) == 0
    results = Results.read(tmp_path / "coordinates.json")
    assert verdicts(results.remarks) == [
        slope("pre_norm", CHANGE, "higher than ±0.25"),
        slope("pre_norm", NONLINEARITY, "within ±0.125"),
        slope("completep", CHANGE, "within ±0.25"),
        slope("completep", NONLINEARITY, "within ±0.125"),
    ]
    printed = capsys.readouterr().out
    assert results.remarks[0] in printed
    assert "pre_norm: changes grow with the size" in printed
    assert "completep: changes are alike" in printed
    change = [row for row in results.rows if row.metric == f"{CHANGE} after update 4"]
    assert [(row.setting, row.size) for row in change[:3]] == [("pre_norm", s) for s in SIZES]
    assert results.row("pre_norm", f"{CHANGE} after update 2").draws[1] == 2 * 1.01 * 2**0.5
    names = {f"coordinates.{end}" for end in ("json", "png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_completep_alone_changes_as_much_and_is_as_nonlinear_at_every_depth(tmp_path):
    """arXiv 2505.01618, figures 7 and 6, with a net of one matrix in each branch."""
    command = ["coordinates", "--config=configs/mlp.py:epochs=3", "--config.optim.name=adamw"]
    options = ["--config.optim.learning_rate=0.001", "--depths=2,8,32,128", "--seeds=5"]
    rules = ["--rules=pre_norm,depth_mup,completep", f"--out={tmp_path}"]
    assert main([*command, *options, *rules]) == 0
    found = Results.read(tmp_path / "coordinates.json").remarks
    assert verdicts(found) == [
        slope("pre_norm", CHANGE, "higher than ±0.25"),
        slope("pre_norm", NONLINEARITY, "within ±0.125"),
        slope("depth_mup", CHANGE, "within ±0.25"),
        slope("depth_mup", NONLINEARITY, "lower than ±0.125"),
        slope("completep", CHANGE, "within ±0.25"),
        slope("completep", NONLINEARITY, "within ±0.125"),
    ]
