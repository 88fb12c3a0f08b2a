"""Exported models of every family: the same logits elsewhere to the bit, the card, mistakes."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rezero_jax
from rezero_jax import command
from rezero_jax.errors import UserError
from rezero_jax.export import FILES, constructor, export, main
from rezero_jax.models.weights import load_tensors, save_tensors
from rezero_jax.training.load import checked_config, restored
from tests.families import FAMILIES, ROOT, STEPS, drawn, flat, refused
from tests.faults.compare import changed_arrays

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
needless = "data training analysis"
needless = [f"rezero_jax.{name}" for name in needless.split()]
needless += ["orbax.checkpoint", "ml_collections", "tensorflow_datasets", "sklearn"]
print([name for name in needless if name in sys.modules])
"""


def elsewhere(code, folder):
    """The result of another process in `folder`, which has this one's settings of the compiler."""
    settings = {name: os.environ[name] for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}
    environment = settings | {"JAX_COMPILATION_CACHE_DIR": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
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
    done = elsewhere(ELSEWHERE, models)
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
    for row in (f"| updates | {STEPS} |", "| batch size | 16 |", "| eval/loss | "):
        assert row in card
    monkeypatch.chdir(models)
    names = run_card(models / family)
    if family == "transformer":
        assert names["new"].shape == (1, 7)
    else:
        assert names["logits"].shape == (1, 10)
    if family == "vit":  # standardised as in training
        np.testing.assert_allclose(names["images"], (51 / 255 - 0.5) / 0.5, rtol=1e-5)


def test_folders_without_a_model_or_with_a_damaged_one(models, tmp_path):
    folder = Path(shutil.copytree(models / "mlp", tmp_path / "mlp"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()

    def check(path, content, words):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        refused(lambda: rezero_jax.load(folder), words)

    refused(lambda: rezero_jax.load(tmp_path), "config.json")
    weights.unlink()
    refused(lambda: rezero_jax.load(folder), "no model.safetensors")
    check(weights, whole[:-10], "damaged")
    check(weights, whole[:-1] + bytes([whole[-1] ^ 1]), "damaged")  # one bit of a weight
    arrays = load_tensors(models / "mlp" / "model.safetensors")
    save_tensors(weights, arrays | {"more": arrays["head.kernel"]})
    refused(lambda: rezero_jax.load(folder), "not of the model in config.json")
    weights.write_bytes(whole)
    rezero_jax.load(folder)
    for broken in (text[:-20], "[]", "{}", text.replace('"width"', '"breadth"')):
        check(config, broken, "broken")
    check(config, text.replace('"rezero"', '"rezro"'), 'did you mean "rezero"')
    check(config, text.replace('"depth": 4', '"depth": 5'), "not of the model in config.json")


def test_a_run_that_has_not_ended_and_mistakes_of_the_command(trained, copy_of, tmp_path, capsys):
    export(str(copy_of("mlp", 4)), str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| updates | 4 |" in card
    assert "eval/loss" not in card
    assert main([str(trained("mlp")), f"--out={tmp_path / 'older'}", "--step=4"]) == 0
    assert "| updates | 4 |" in (tmp_path / "older" / "README.md").read_text()
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


# ---- Models of one's own


MADE = {
    **{name: family.make for name, family in FAMILIES.items()},
    # Rules of ResNets determine more than how a branch joins the trunk.
    "fixup": lambda rngs: rezero_jax.ResNet.cifar(8, "fixup", 4, width=4, rngs=rngs),
    "preact": lambda rngs: rezero_jax.ResNet.preact(18, width=4, scan=True, rngs=rngs),
    "encoder": lambda rngs: rezero_jax.Encoder(
        width=8, depth=3, heads=2, scan=False, norm="dyt", rngs=rngs
    ),
    "decoder layer": lambda rngs: rezero_jax.DecoderLayer(8, 2, dropout=0.1, rngs=rngs),
    "bfloat16": lambda rngs: rezero_jax.MLP(
        4, 8, 2, 3, alpha_init=0.5, dtype="bfloat16", rngs=rngs
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_model_of_ones_own_is_saved_and_loaded_to_the_bit(name, tmp_path):
    model = nnx.eval_shape(lambda: MADE[name](rngs=nnx.Rngs(0)))
    for variable in jax.tree.leaves(
        nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable)
    ):
        noise = RNG.normal(size=variable.shape)
        variable.set_value(jnp.asarray(noise, variable.dtype))
    training = nnx.graphdef(model)
    rezero_jax.save(model, tmp_path / "model")
    assert nnx.graphdef(model) == training  # save leaves the mode of the model
    loaded = rezero_jax.load(tmp_path / "model")
    model.eval()
    assert nnx.graphdef(loaded) == nnx.graphdef(model)
    states = (flat(nnx.to_pure_dict(nnx.state(one))) for one in (loaded, model))
    assert changed_arrays(*states) == []


def test_a_model_that_cannot_be_made_again_is_not_saved(tmp_path):
    model = drawn(MADE["mlp"])
    model.head = drawn(partial(nnx.Linear, 6, 2))
    stack = drawn(partial(rezero_jax.Stack, lambda rngs: nnx.Linear(2, 2, rngs=rngs), 2))
    for one, words in ((model, "was changed after"), (stack, "numbers and names alone")):
        with pytest.raises(UserError, match=words):
            rezero_jax.save(one, tmp_path / "model")
    assert not any(tmp_path.iterdir())


# ---- Folders and names of strangers


def files_of(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_an_export_replaces_only_an_export_and_follows_no_link(trained, models, tmp_path, capsys):
    run = shutil.copytree(trained("mlp"), tmp_path / "run")
    other, hub = tmp_path / "other", tmp_path / "hub"
    for folder in (other, hub):
        folder.mkdir()
    (other / "README.md").write_text("mine")
    (hub / "config.json").write_text('{"model_type": "bert"}')
    (hub / "model.safetensors").write_text("theirs")
    with pytest.raises(SystemExit):
        main([str(run), "--out="])
    assert "--out" in capsys.readouterr().err
    for out in (run, other, hub, run / "checkpoints", tmp_path / "other/README.md"):
        before = files_of(tmp_path)
        assert main([str(run), f"--out={out}"]) == 2
        assert files_of(tmp_path) == before
    folder = Path(shutil.copytree(models / "resnet", tmp_path / "a[1]$b"))
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    left = tmp_path / f".{folder.name}.{'0' * 32}"  # of a process that was killed
    left.mkdir()
    before = (tmp_path / "config.json").read_bytes()
    assert main([str(run), f"--out={folder}"]) == 0
    assert type(rezero_jax.load(folder)).__name__ == "MLP"
    assert (tmp_path / "config.json").read_bytes() == before
    assert not left.exists()
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_a_package_that_is_not_installed_is_a_sentence(capsys):
    assert command.exit_status("export", lambda: importlib.import_module("missing_one")) == 2
    assert 'missing_one\'; install what training needs: pip install ".[train]"' in (
        capsys.readouterr().err
    )


def test_the_current_folder_is_filled_in_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for family in ("mlp", "resnet"):
        model = drawn(FAMILIES[family].make)
        rezero_jax.save(model, ".")
        assert type(rezero_jax.load(".")) is type(model)
        assert Path.cwd().samefile(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


KILLS = """\
import itertools, os, signal, sys
from pathlib import Path
from rezero_jax.runs.moving import replace_folder

home, names = Path.cwd() / "home", ("model.safetensors", "config.json", "README.md")
old, new = ({name: bytes([i]) * 10**5 for name in names} for i in range(2))
changes = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
found = []
for step in itertools.count():
    replace_folder(home / "model", old)
    if (pid := os.fork()) == 0:
        calls = itertools.count()

        def die(event, _):
            if event in changes and next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        replace_folder(home / "model", new)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    model = {path.name: path.read_bytes() for path in (home / "model").iterdir()}
    assert model in (old, new), (step, model.keys())
    found.append(model == new)
    if status == 0:
        break
replace_folder(home / "model", old)
assert [path.name for path in home.iterdir()] == ["model"]  # what was left is removed
print(found.count(False), found.count(True))
"""


def test_a_process_killed_while_it_replaces_a_model_leaves_the_old_or_the_new_one(tmp_path):
    """A process dies just before each of the calls that change files, in turn."""
    done = elsewhere(KILLS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert min(map(int, done.stdout.split())) >= 3


def test_names_of_a_strangers_run_are_escaped_in_the_card(trained, tmp_path, capsys):
    run = shutil.copytree(trained("mlp"), tmp_path / "run")
    record, final = (
        json.loads((run / name).read_text()) for name in ("dataset.json", "final.json")
    )
    bad = "x\n# y <img src=z> [a](http://b) `c` \x1b[31m|"
    (run / "dataset.json").write_text(json.dumps(record | {"name": bad}))
    (run / "final.json").write_text(json.dumps(final | {bad: 1.0}))
    folder = tmp_path / "q'); print(1) #"
    assert main([str(run), f"--out={folder}"]) == 0
    card = (folder / "README.md").read_text()
    outside, usage = card.split("```python\n")
    assert usage.count("print(1)") == 1
    assert 'load("q\'); print(1) #")' in usage
    assert not re.search(r"(?<!\\)[<`\[]|\x1b|^# y", outside)
    assert "\x1b" not in capsys.readouterr().out
