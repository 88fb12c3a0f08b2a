"""Exported models of every family: the same logits elsewhere to the bit, the card, mistakes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rezero_jax
from rezero_jax.errors import UserError
from rezero_jax.export import constructor, export, main
from rezero_jax.models.weights import load_tensors, save_tensors
from rezero_jax.training.load import checked_config, restored
from tests.families import FAMILIES, ROOT, STEPS
from tests.gcs.server import serving

RNG = np.random.default_rng(0)
INPUTS = {
    "mlp": RNG.normal(size=(3, 64)).astype(np.float32),
    "resnet": RNG.normal(size=(3, 8, 8, 1)).astype(np.float32),
    "transformer": RNG.integers(0, 256, (3, 8)),
    "vit": RNG.normal(size=(3, 8, 8, 1)).astype(np.float32),
}
ELSEWHERE = """\
import sys

import jax
import numpy as np

import rezero_jax

inputs = np.load("inputs.npz")
logits = {}
for family in inputs:
    model = rezero_jax.load(family)
    logits[family] = jax.jit(lambda model, x: model(x))(model, inputs[family])
np.savez("logits.npz", **logits)
needless = "data runs training analysis"
needless = [f"rezero_jax.{name}" for name in needless.split()]
needless += ["orbax.checkpoint", "ml_collections", "tensorflow_datasets", "sklearn"]
print([name for name in needless if name in sys.modules])
"""


def elsewhere(code, folder, environment):
    """The result of another process in `folder`, which has this one's settings of the compiler."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        }
        | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def models(trained, tmp_path_factory):
    """The folder with each family's exported model in a folder of its name."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        export(str(trained(family)), str(folder / family))
    return folder


@pytest.mark.slow
def test_another_process_has_the_same_logits_to_the_bit_without_the_data(trained, models):
    np.savez(models / "inputs.npz", **INPUTS)
    done = elsewhere(ELSEWHERE, models, {})
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    found = np.load(models / "logits.npz")
    for family, x in INPUTS.items():
        make = constructor(json.loads((models / family / "config.json").read_text()))
        model, steps = restored(trained(family), checked_config(trained(family)), make)
        assert steps == STEPS
        expected = jax.jit(lambda model, x: model(x))(model, jnp.asarray(x))
        np.testing.assert_array_equal(found[family], expected, err_msg=family)
        assert np.std(expected) > 0


def test_the_file_has_the_parameters_and_running_statistics_and_no_more(trained, models):
    for family in FAMILIES:
        model = rezero_jax.load(models / family)
        leaves = nnx.to_flat_state(nnx.state(model))
        arrays = load_tensors(models / family / "model.safetensors")
        assert arrays.keys() == {".".join(map(str, path)) for path, _ in leaves}
        assert any(".mean" in name for name in arrays) is (family == "resnet")
        final = json.loads((trained(family) / "final.json").read_text())
        params = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert sum(leaf.size for leaf in params) == final["parameters"]
        for _, module in nnx.iter_modules(model):
            assert getattr(module, "deterministic", True)  # dropout
            assert getattr(module, "use_running_average", True)  # BatchNorm


def run_card(folder):
    """What the Python in a model card defines when it is run as a reader with an image would."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(re.sub(r"np\.zeros\((.*), np\.uint8\)", r"np.full(\1, 51, np.uint8)", code), names)
    return names


@pytest.mark.parametrize(
    "family", ["mlp", "resnet", "transformer", pytest.param("vit", marks=pytest.mark.slow)]
)
def test_the_card_describes_the_run_and_its_python_runs(family, models, monkeypatch):
    card = (models / family / "README.md").read_text()
    names = {"mlp": "MLP", "resnet": "ResNet.cifar", "transformer": "Transformer", "vit": "ViT"}
    assert card.startswith(f"# {names[family]}, rezero, ")
    assert f"| updates | {STEPS} |\n| batch size | 16 |\n" in card
    assert "| eval/loss | " in card
    monkeypatch.chdir(models)
    names = run_card(models / family)
    if family == "transformer":
        assert names["new"].shape == (1, 7)
    else:
        assert names["logits"].shape == (1, 10)
    if family == "vit":  # standardised as in training
        np.testing.assert_allclose(names["images"], (51 / 255 - 0.5) / 0.5, rtol=1e-5)


@pytest.mark.slow
def test_a_model_goes_to_a_bucket_and_comes_back(trained, models):
    code = f"""\
import numpy as np
from rezero_jax.export import load, main

assert main([{str(trained("mlp"))!r}, "--out=gs://models/a/mlp"]) == 0
x = np.load("inputs.npz")["mlp"]
np.testing.assert_array_equal(load("gs://models/a/mlp")(x), load("mlp")(x))
assert main([{str(trained("mlp"))!r}, "--out=gs://others/mlp"]) == 2
"""
    np.savez(models / "inputs.npz", **INPUTS)
    with serving(["models"]) as server:
        done = elsewhere(code, models, server.environment)
    assert done.returncode == 0, done.stderr
    assert "export: cannot use gs://others" in done.stderr


def sentence(folder):
    with pytest.raises(UserError) as error:
        rezero_jax.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_without_a_model_or_with_a_damaged_one(models, tmp_path):
    assert "no exported model: there is no config.json" in sentence(tmp_path)
    folder = Path(shutil.copytree(models / "mlp", tmp_path / "mlp"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.unlink()
    assert "there is no model.safetensors" in sentence(folder)
    arrays = load_tensors(models / "mlp" / "model.safetensors")
    for content in (whole[:-10], whole[:-1] + bytes([whole[-1] ^ 1])):  # one bit of a weight
        weights.write_bytes(content)
        assert "is damaged" in sentence(folder)
    save_tensors(weights, arrays | {"more": arrays["head.kernel"]})
    assert "is not of the model that config.json describes" in sentence(folder)
    weights.write_bytes(whole)
    rezero_jax.load(folder)
    for broken in (text[:-20], "[]", "{}", text.replace('"width"', '"breadth"')):
        config.write_text(broken)
        assert "is broken or of another version" in sentence(folder)
    config.write_text(text.replace('"rezero"', '"rezro"'))
    assert 'did you mean "rezero"' in sentence(folder)
    depth = json.loads(text)["model"]["depth"]
    config.write_text(text.replace(f'"depth": {depth}', f'"depth": {depth + 1}'))
    assert "is not of the model that config.json describes" in sentence(folder)


def test_a_run_that_has_not_ended_and_mistakes_of_the_command(trained, copy_of, tmp_path, capsys):
    export(str(copy_of("mlp", 4)), str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| updates | 4 |" in card
    assert "eval/loss" not in card
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    for workdir, out, text in (
        (tmp_path / "none", tmp_path / "out", "no run"),
        (trained("mlp"), tmp_path / "file", "cannot be written"),
    ):
        assert main([str(workdir), f"--out={out}"]) == 2
        [error] = capsys.readouterr().err.splitlines()
        assert error.startswith("export: ")
        assert text in error
    assert not (tmp_path / "out").exists()


def test_a_saved_resnet_has_the_blocks_of_its_rule(tmp_path):
    """Rules of ResNets are names that determine more than how a branch joins the trunk."""
    x = jnp.asarray(RNG.normal(size=(2, 8, 8, 3)), jnp.float32)
    for rule in ("residual", "fixup"):
        model = rezero_jax.ResNet.cifar(8, rule, 4, width=4, rngs=nnx.Rngs(0))
        rezero_jax.export.save(model, tmp_path / rule)
        model.eval()
        np.testing.assert_array_equal(rezero_jax.load(tmp_path / rule)(x), model(x))
