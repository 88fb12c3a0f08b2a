"""The page and the picture on the state of a network, of one's own or of a run."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train
from rezero_jax import ReZero, Stack
from rezero_jax.analysis import __main__ as analysis
from rezero_jax.analysis.diagnosis import diagnose
from rezero_jax.analysis.gates import Gates
from rezero_jax.analysis.plots.figures import plot_diagnosis, plot_propagation
from rezero_jax.runs.reader import Run
from rezero_jax.training.load import load_model

CONFIGS = Path(__file__).parents[1] / "configs"
X = jax.random.normal(jax.random.key(0), (4, 6))


class Scaled(nnx.Module):
    """f(x) = 2 x."""

    def __call__(self, x):
        return 2 * x


@pytest.fixture(scope="module")
def toy():
    """x -> (1 + 2 alpha) x in every layer, with gates of which some are shut."""
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
    assert head == "Stack, means over 4 examples"
    assert entries["layers"] == "8"
    assert entries["signal"] == (
        f"|x| {first:.3g} -> {first * growth:.3g}, x {growth:.3g}, x {growth ** (1 / 8):.5g} "
        "a layer, on the way through the layers"
    )
    assert f", x {growth:.3g}, x " in entries["gradient"]
    assert entries["Jacobian"].startswith(f"mean squared singular value {growth**2:.3g} +- ")
    assert entries["gates"] == (
        "3 of 8 open (|alpha| >= 0.1 / 8), mean |alpha| 0.156, largest 0.5; "
        "shut: model.1 to model.2, model.5 to model.7"
    )
    assert entries["idle"] == (
        "5 of 8 layers move x by less than 0.1 / 8 of |x|: model.1 to model.2, model.5 to model.7"
    )
    assert table[0].split() == ["after", "layer", "|x|", "|dL/dx|", "cosine", "|x'-x|/|x|", "alpha"]
    assert [row.split()[0] for row in table[1:]] == ["(input)", *(f"model.{i}" for i in range(8))]
    assert table[6].split()[-2:] == ["0.5", "-0.25"]


def test_a_page_stays_a_page_and_says_what_is_not_there():
    stack = Stack(lambda rngs: nnx.Linear(6, 6, rngs=rngs), 100, rngs=nnx.Rngs(0))
    diagnosis = diagnose(stack, X[:1], subject="a name")
    head, entries, table = page(diagnosis)
    assert (head, entries["gates"]) == ("a name", "none")
    assert "cosine of two examples' x - before, - after" in entries["angles"]
    assert "alpha" not in table[0]
    assert len(str(diagnosis).split("\n")) < 50
    assert max(map(len, str(diagnosis).split("\n"))) <= 100
    assert (table[1].split()[0], table[-1].split()[0]) == ("(input)", "model.99")


def test_the_picture_shows_the_numbers(toy):
    figure = plot_diagnosis(toy)
    signal, gradient, alpha, cosine, share = figure.axes
    for axis, values in (
        (signal, toy.propagation.signal),
        (gradient, toy.propagation.gradient),
        (alpha, toy.propagation.alpha),
        (cosine, toy.propagation.cosine),
        (share, toy.propagation.share),
    ):
        np.testing.assert_array_equal(axis.lines[0].get_ydata(), values)
    assert share.lines[1].get_ydata()[0] == 0.1 / 8
    assert signal.get_ylim()[1] / signal.get_ylim()[0] >= 2

    figure = plot_propagation({"a": toy.propagation, "b": toy.propagation})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


# ---- Of a run


def train_tiny(workdir, config, *flags):
    """Trains the smallest network of a config for a few updates."""
    flags = [f"--config.{flag}" for flag in ("mesh.cpu_devices=none", "mesh.data=1", *flags)]
    assert train.main([f"--config={CONFIGS / config}", f"--workdir={workdir}", *flags]) == 0
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mlp"
    flags = ("train.epochs=none", "train.steps=20", "log.every_steps=5", "eval.every_epochs=none")
    return train_tiny(folder, "mlp.py:smoke", *flags, "checkpoint.every_steps=10")


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_the_command_prints_the_page_and_writes_the_picture_alone(run, capsys):
    before = files(run)
    assert analysis.main([str(run)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert files(run) - before == {Path("diagnosis.png")}
    assert (run / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    assert out.startswith(f"{run} after 20 updates, means over 16 examples\n\nlayers    4\n")
    assert out.endswith(f"\n\ndrawn in {run / 'diagnosis.png'}\n")

    # the gates of the page are those that the run recorded
    gates = Gates.of_run(Run.read(run))
    shown = [float(line.split()[-1]) for line in out.split("\n") if line.startswith("trunk.")]
    np.testing.assert_allclose(shown, gates.alphas[-1], rtol=5e-3)


def test_the_diagnosis_is_of_the_runs_own_loss_and_data(run):
    model, step, program = load_model(run)
    batch = program.examples(16)
    assert step == 20
    np.testing.assert_array_equal(batch["image"], program.examples(10**9)["image"][:16])
    losses = program.objective(model, program.examples(10**9), jax.random.key(0))["loss"]
    recorded = [line["eval/loss"] for line in Run.read(run).lines if "eval/loss" in line]
    np.testing.assert_allclose(losses.mean(), recorded[-1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "flags", "layer"),
    [
        ("resnet.py:smoke", ("train.epochs=none", "train.steps=10"), "stages.1.entry"),
        ("transformer_small.py:smoke,steps=10", (), "trunk.layers.1"),
    ],
)
def test_other_families(tmp_path, capsys, config, flags, layer):
    workdir = train_tiny(tmp_path / "run", config, *flags)
    capsys.readouterr()
    picture = tmp_path / "picture.svg"
    assert analysis.main([str(workdir), f"--out={picture}"]) == 0
    out = capsys.readouterr().out
    assert f"\n{layer} " in out
    assert " open (|alpha| >= " in out
    assert "after 10 updates" in picture.read_text()


def test_mistakes_are_told_in_a_sentence(run, tmp_path, capsys):
    def refused(*arguments):
        assert analysis.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    assert refused(tmp_path) == (
        f"analysis: {tmp_path} holds no run: there is no config.json in it; train there first\n"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model": {"name": "mlp"}}))
    assert refused(tmp_path) == (
        f"analysis: {tmp_path} holds no checkpoint yet; wait for the first, or train there\n"
    )
    assert 'unknown ending of a picture ".jpg"' in refused(run, "--out=a.jpg")
