"""The page and the picture on the state of a network, alone or of a run."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rezero_jax
from rezero_jax import ReZero, Stack
from rezero_jax.analysis import __main__ as analysis
from rezero_jax.analysis import plots
from rezero_jax.analysis.ablation import ablate, plot_ablation
from rezero_jax.analysis.diagnosis import diagnose
from rezero_jax.analysis.figures import plot_diagnosis, plot_propagation
from rezero_jax.analysis.gates import Gates
from rezero_jax.analysis.propagation import propagate
from rezero_jax.analysis.singular_values import singular_values
from rezero_jax.errors import UserError
from rezero_jax.residual import make_rule
from rezero_jax.runs.reader import Run
from rezero_jax.training import loop
from rezero_jax.training.trainer import Trainer
from tests.families import STEPS, config, unrolled

X = jax.random.normal(jax.random.key(0), (4, 6))


class Scaled(nnx.Module):
    """f(x) = 2 x."""

    def __call__(self, x):
        return 2 * x


class Loop(nnx.Module):
    """A model of a user's own that calls a rule for each of its functions."""

    def __init__(self, depth):
        self.rules = nnx.List([make_rule("rezero", 6, rngs=nnx.Rngs(0)) for _ in range(depth)])
        self.functions = nnx.List([Scaled() for _ in range(depth)])

    def __call__(self, x):
        for rule, f in zip(self.rules, self.functions, strict=True):
            x = rule(x, f)
        return x


def test_a_model_that_calls_a_list_of_rules_has_a_layer_for_each():
    model = Loop(3)
    model.rules[1].alpha[...] = 0.5
    found = diagnose(model, X).propagation
    assert found.names == ("rules.0", "rules.1", "rules.2")
    np.testing.assert_allclose(found.alpha, [0, 0.5, 0])
    np.testing.assert_allclose(found.signal / found.signal[0], [1, 1, 2, 2], rtol=1e-6)


def test_a_layer_that_is_left_out_is_a_gate_at_0():
    """Three layers x -> (1 + 2 alpha) x, for gates of 0.5, -0.25 and 1.5."""
    scanned = Stack(lambda _: ReZero(Scaled()), 3, rngs=nnx.Rngs(0))
    scanned.blocks.alpha[...] = jnp.array([0.5, -0.25, 1.5])
    for stack in (scanned, unrolled(scanned)):
        found = ablate(stack, jnp.ones((2, 6)), lambda model, x: model(x).mean(1))
        assert found.names == ("model.0", "model.1", "model.2")
        assert found.loss == pytest.approx(2 * 0.5 * 4)
        np.testing.assert_allclose(found.without, [2, 8, 1])
        assert found.order.tolist() == [2, 0, 1]
        np.testing.assert_allclose(found.cumulative, [1, 0.5, 1])
    assert "| model.1 | 8 | +4 |" in str(found)
    assert len(plot_ablation(found).axes[0].patches) == 3


def test_zeros_are_visible_on_logarithmic_axes():
    """A fresh gate's share is 0: its line is above the end of the axis, at a tick "0"."""
    networks = {
        str(gate): propagate(Stack(lambda _, g=gate: ReZero(Scaled(), g), 3, rngs=nnx.Rngs(0)), X)
        for gate in (0.0, 0.5)
    }
    figure = plot_propagation(networks)
    figure.draw_without_rendering()
    axis = figure.axes[3]
    assert (axis.lines[0].get_ydata() == 0).all()
    assert axis.get_ylim()[0] < 0
    assert [t.get_text() for t in axis.get_yticklabels() if t.get_position()[1] == 0] == ["0"]
    assert axis.get_yscale() == "symlog"
    assert figure.axes[0].get_yscale() == "log"


def test_an_open_run_evaluates_as_training_did_and_again_after_a_change(trained):
    run = rezero_jax.open_run(trained("mlp"))
    last = run.log.lines[-1]
    found = run.evaluate()
    assert run.step == last["step"]
    assert found["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    batch = run.examples(5)  # as the model takes them
    logits = run.model(batch["image"])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    np.testing.assert_array_equal(run.losses(run.model, batch), expected)
    assert singular_values(run.model, batch["image"]).shape == (5, 10)
    assert len(run.frame()) == len(run.log.lines)
    names = list(run.layers())
    assert names == list(diagnose(run.model, run.examples(4), run.losses).propagation.names)
    run.model.head.kernel[...] *= 0
    assert run.evaluate()["eval/loss"] != found["eval/loss"]


def test_metrics_of_ones_own_and_by_layer_are_logged_and_drawn(tmp_path):
    name = "rezero_jax.analysis.diagnosis:by_layer"
    fields = {"eval.metrics": name, "train.steps": 4, "train.epochs": None, "eval.every_steps": 2}
    made = config("mlp.py:smoke", **fields)
    loop.train(made, tmp_path / "a")
    run = Run.read(tmp_path / "a")
    steps, signal = run.series("metric/signal/0")
    assert steps.tolist() == [2, 4]
    assert (signal > 0).all()
    assert {"metric/gradient/2", "metric/weight_gradient/1"} <= run.lines[-1].keys()
    axes = plots.plot_run(run).axes
    assert [axis.get_title() for axis in axes].count("log10 of |dL/dw|") == 1
    ticks = [axis.get_yticks() for axis in axes if "layer" in axis.get_ylabel()]
    assert len(ticks) == 4
    assert all((one == one.round()).all() for one in ticks)

    found = loop.evaluate(made, tmp_path / "a")
    assert found["metric/signal/0"] == pytest.approx(signal[-1])

    def own(model, batch, losses):
        found = {"largest": losses(model, batch).max(), "images": len(batch["image"])}
        return found | {"undefined": float("nan")}

    loop.train(made, tmp_path / "b", metrics=own)
    line = Run.read(tmp_path / "b").lines[-1]
    assert line["metric/images"] == 16
    assert "metric/undefined" not in line
    assert line["metric/largest"] > line["eval/loss"]
    trainer = Trainer(made)
    state = trainer.init()
    for returned, words in ((3, "returns 3; return"), ({"x": jnp.ones(2)}, "returns .*x")):
        with pytest.raises(UserError, match=rf"eval\.metrics {words}"):
            trainer.measure(state, lambda model, batch, losses, returned=returned: returned)


@pytest.fixture(scope="module")
def toy():
    """x -> (1 + 2 alpha) x in every layer, with some gates shut."""
    stack = Stack(lambda _: ReZero(Scaled()), 8, rngs=nnx.Rngs(0))
    stack.blocks.alpha[...] = jnp.array([0.5, 0.001, 0.0, 0.5, -0.25, 0.0, 0.0, 0.0])
    return diagnose(stack, X)


def page(diagnosis):
    """The entries of the page by their names, and the rows of its table."""
    head, entries, table = str(diagnosis).split("\n\n")
    entries = re.sub(r"\n {10}", " ", entries)
    return head, dict(line.split(maxsplit=1) for line in entries.split("\n")), table.split("\n")


def test_the_page_of_a_network_known_in_closed_form(toy):
    head, entries, table = page(toy)
    growth = 2 * 1.002 * 2 * 0.5
    first = np.linalg.norm(X, axis=1).mean()
    factors = f"x {growth:.3g}, x {growth ** (1 / 8):.5g} a layer"
    assert (head, entries["layers"]) == ("Stack, means over 4 examples", "8")
    for entry, text in (
        ("signal", f"|x| {first:.3g} -> {first * growth:.3g}, {factors}"),
        ("gradient", factors),
        ("Jacobian", f"squared singular value {growth**2:.3g} +- "),
        ("gates", "3 of 8 open"),
        ("gates", "mean |alpha| 0.156, largest 0.5"),
        ("gates", ": model.1 to model.2, model.5 to model.7"),
        ("idle", "5 of 8 layers"),
        ("idle", ": model.1 to model.2, model.5 to model.7"),
    ):
        assert text in entries[entry]
    assert table[0].split()[2:] == ["|x|", "|dL/dx|", "cosine", "|x'-x|/|x|", "|dL/dw|", "alpha"]
    assert [row.split()[0] for row in table[1:]] == ["(input)", *(f"model.{i}" for i in range(8))]
    assert table[6].split()[-3] == "0.5"
    assert table[6].split()[-1] == "-0.25"


def test_a_deep_network_without_gates_still_fits_a_page():
    stack = Stack(lambda rngs: nnx.Linear(6, 6, rngs=rngs), 100, rngs=nnx.Rngs(0))
    diagnosis = diagnose(stack, X[:1], subject="a name")
    head, entries, table = page(diagnosis)
    assert (head, entries["gates"]) == ("a name", "none")
    assert "x - before, - after" in entries["angles"]  # one example has no angle
    assert "alpha" not in table[1]
    lines = str(diagnosis).split("\n")
    assert len(lines) < 50
    assert max(map(len, lines)) <= 100
    assert table[0] == "23 of 100 layers, evenly spaced:"
    assert (table[2].split()[0], table[-1].split()[0]) == ("(input)", "model.99")


def test_the_picture_shows_the_numbers(toy):
    axes = plot_diagnosis(toy).axes
    signal, share = axes[0], axes[-1]
    found = toy.propagation
    values = (found.signal, found.gradient, found.alpha, found.cosine, found.share)
    for axis, expected in zip(axes, values, strict=True):
        np.testing.assert_array_equal(axis.lines[0].get_ydata(), expected)
    assert share.lines[1].get_ydata()[0] == 0.1 / 8
    assert signal.get_ylim()[1] / signal.get_ylim()[0] >= 2
    (legend,) = plot_propagation({"a": found, "b": found}).legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_the_command_prints_the_page_and_writes_the_picture_alone(copy_of, capsys):
    run = copy_of("mlp", STEPS)
    before = set(run.rglob("*"))
    capsys.readouterr()
    assert analysis.main([str(run)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert set(run.rglob("*")) - before == {run / "diagnosis.png"}
    assert (run / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    assert out.startswith(f"{run} after {STEPS} updates, means over 16 examples\n\nlayers    ")
    assert out.endswith(f"\n\ndrawn in {run / 'diagnosis.png'}\n")
    gates = Gates.of_run(Run.read(run))  # the gates of the page are the recorded ones
    shown = [float(line.split()[-1]) for line in out.split("\n") if line.startswith("trunk.")]
    np.testing.assert_allclose(shown, gates.alphas[-1], rtol=5e-3)


def test_mistakes(trained, tmp_path, capsys):
    shutil.copy(trained("mlp") / "config.json", tmp_path)
    for arguments, text in (
        ([str(tmp_path / "none")], "no run"),
        ([str(tmp_path)], "no good checkpoint"),
        ([str(trained("mlp")), "--out=a.jpg"], 'unknown ending of a picture ".jpg"'),
    ):
        assert analysis.main(arguments) == 2
        assert text in capsys.readouterr().err
