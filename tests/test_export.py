"""Exported models of every family: the same logits to the bit elsewhere, the card, mistakes."""

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
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.export import export, main
from rezero_jax.models import exported
from rezero_jax.models.tensors import load_tensors, save_tensors
from rezero_jax.runs.folder import read_config
from rezero_jax.training import loop
from rezero_jax.training.load import restored
from tests.gcs.server import serving

ROOT = Path(__file__).parents[1]
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

jax.config.update("jax_disable_most_optimizations", True)
inputs = np.load("inputs.npz")
logits = {}
for family in inputs:
    model = rezero_jax.load(family)
    logits[family] = jax.jit(lambda model, x: model(x))(model, inputs[family])
np.savez("logits.npz", **logits)
needless = "rezero_jax.data rezero_jax.training ml_collections tensorflow_datasets sklearn"
print([name for name in needless.split() if name in sys.modules])
"""


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Family -> the folder of a run; those of the first three have not ended."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("mlp", "resnet", "transformer"):
        shutil.copytree(ROOT / "tests" / "reference" / "runs" / name, folder / name)
    fields = ["train.steps=2", "mesh.data=1"]
    loop.train(load_config(f"{ROOT}/configs/vit.py:smoke", fields), folder / "vit")
    return {name: folder / name for name in INPUTS}


@pytest.fixture(scope="module")
def models(workdirs, tmp_path_factory):
    """The folder in which each family's model lies, in a folder of its name."""
    folder = tmp_path_factory.mktemp("models")
    for family, workdir in workdirs.items():
        export(str(workdir), str(folder / family))
    return folder


def test_another_process_has_the_same_logits_to_the_bit_without_the_data(workdirs, models):
    np.savez(models / "inputs.npz", **INPUTS)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        cwd=models,
        env={"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    found = np.load(models / "logits.npz")
    for family, x in INPUTS.items():
        make = exported.constructor(json.loads((models / family / "config.json").read_text()))
        model, steps = restored(workdirs[family], read_config(workdirs[family]), make)
        assert steps == (2 if family == "vit" else 8)
        expected = jax.jit(lambda model, x: model(x))(model, jnp.asarray(x))
        np.testing.assert_array_equal(found[family], expected, err_msg=family)
        assert np.std(expected) > 0


def test_the_arrays_are_those_of_the_checkpoint_and_no_more(workdirs, models):
    for family, workdir in workdirs.items():
        arrays = load_tensors(models / family / "model.safetensors")
        parameters = sum(value.size for name, value in arrays.items() if "mean" not in name)
        if family == "vit":
            assert parameters == json.loads((workdir / "final.json").read_text())["parameters"]
        assert any(".mean" in name for name in arrays) is (family == "resnet")
        model = rezero_jax.load(models / family)
        for _, module in nnx.iter_modules(model):
            assert getattr(module, "deterministic", True)  # dropout
            assert getattr(module, "use_running_average", True)  # BatchNorm


@pytest.mark.parametrize("family", INPUTS)
def test_the_card_tells_the_run_and_its_python_runs(family, models, monkeypatch):
    card = (models / family / "README.md").read_text()
    config = json.loads((models / family / "config.json").read_text())
    assert card.startswith(f"# {family}, rezero, ")
    assert f"`{config['model']['residual']}`" in card
    assert f"{config['steps']} updates of batches of" in card
    has_final = family == "vit"
    assert ("| eval/accuracy | 0." in card) is has_final
    assert ("there are no final metrics" in card) is not has_final
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(models)
    names = {}
    exec(code, names)
    shape = names["new" if family == "transformer" else "logits"].shape
    assert shape == ((1, 7) if family == "transformer" else (1, 10))


def test_the_pixels_of_the_card_are_standardised_as_in_training(models, monkeypatch):
    card = (models / "vit" / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "np.zeros((1, 8, 8, 1), np.uint8)" in code
    code = code.replace("np.zeros((1, 8, 8, 1), np.uint8)", "np.full((1, 8, 8, 1), 51, np.uint8)")
    monkeypatch.chdir(models)
    names = {}
    exec(code, names)
    np.testing.assert_allclose(names["images"], (0.2 - 0.5) / 0.5, rtol=1e-6)


@pytest.mark.slow
def test_a_model_goes_to_a_bucket_and_comes_back(workdirs, models):
    code = f"""\
from rezero_jax.export import main
from rezero_jax.models.exported import load, save

assert main([{str(workdirs["mlp"])!r}, "--out=gs://models/a/mlp"]) == 0
save(load("gs://models/a/mlp"), {{}}, "again")
assert main([{str(workdirs["mlp"])!r}, "--out=gs://others/mlp"]) == 2
"""
    with serving(["models"]) as server:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=models,
            env={"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""} | server.environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert "export: cannot use gs://others: there is no such bucket" in done.stderr
    again, mlp = (models / name / "model.safetensors" for name in ("again", "mlp"))
    assert again.read_bytes() == mlp.read_bytes()


def sentence(f, *args):
    with pytest.raises(UserError) as error:
        f(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_exported_model_or_a_damaged_one(models, tmp_path):
    load = rezero_jax.load
    assert f"{tmp_path} holds no exported model: there is no config.json" in sentence(
        load, tmp_path
    )
    folder = Path(shutil.copytree(models / "mlp", tmp_path / "mlp"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.unlink()
    assert "there is no model.safetensors in it; write one by" in sentence(load, folder)
    weights.write_bytes(whole[:-10])
    assert "is damaged" in sentence(load, folder)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit of a weight
    assert "is damaged" in sentence(load, folder)

    unsigned = {key: value for key, value in json.loads(text).items() if key != "sha256"}
    config.write_text(json.dumps(unsigned))  # as earlier versions wrote it
    arrays = load_tensors(models / "mlp" / "model.safetensors")
    kernel = arrays.pop("head.kernel")
    save_tensors(weights, arrays)
    assert 'lacks "head.kernel"; export the run again' in sentence(load, folder)
    save_tensors(weights, arrays | {"head.kernel": kernel, "more": kernel})
    assert 'has a needless "more"; export the run again' in sentence(load, folder)
    save_tensors(weights, arrays | {"head.kernel": kernel.T})
    assert '"head.kernel" in' in sentence(load, folder)
    weights.write_bytes(whole)
    load(folder)

    for broken in (text[:-20], "[]", "{}", text.replace('"width"', '"breadth"')):
        config.write_text(broken)
        assert "is broken or of another version of rezero_jax" in sentence(load, folder)
    config.write_text(text.replace('"rezero"', '"rezro"'))
    assert 'did you mean "rezero"' in sentence(load, folder)


def test_mistakes_of_the_command(workdirs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for workdir, out, text in (
        (tmp_path / "none", tmp_path / "out", "holds no run"),
        (workdirs["mlp"], tmp_path / "file", "cannot be written"),
    ):
        assert main([str(workdir), f"--out={out}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("export: ")
        assert text in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
