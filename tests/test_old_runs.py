"""Runs made by version 0.1.0, before the code was rearranged, still resume, load and evaluate.

`reference/runs/NAME` is a run of twelve updates that stopped after the eighth; `expected.json` and
the last line of `metrics.jsonl` are those of the same run, uninterrupted, by the old code. Made by

    python train.py --config=configs/mlp.py:smoke --workdir=tests/reference/runs/mlp LENGTHS
    python train.py --config=configs/resnet.py:smoke --workdir=tests/reference/runs/resnet LENGTHS
    python train.py --config=configs/transformer_small.py:smoke --config.data.name=text \
        --config.data.path=tests/reference/runs/text.txt \
        --workdir=tests/reference/runs/transformer LENGTHS

where LENGTHS sets train.steps=12, train.epochs=None, checkpoint.every_steps=8, log.every_steps=2,
train.steps_per_dispatch=2, eval.every_epochs=None, eval.examples=64 and mesh.cpu_devices=1.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from rezero_jax.config import base_config, load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.folder import check_config, continued, read_config
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop
from rezero_jax.training.load import load_model

REFERENCE = Path(__file__).parent / "reference/runs"
FAMILIES = ("mlp", "resnet", "transformer")


@pytest.fixture
def old_run(request, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # the text's path is relative
    return Path(shutil.copytree(REFERENCE / request.param, tmp_path / request.param))


def config_of(folder):
    """What the command that made the run says today: younger fields have their defaults."""
    config = ConfigDict(json.loads(base_config().to_json()))
    with config.ignore_type():
        config.update(json.loads((folder / "config.json").read_text()))
    config.mesh.data = 1
    return config


@pytest.mark.parametrize("old_run", FAMILIES, indirect=True)
def test_an_old_run_resumes_to_the_old_result(old_run):
    expected = json.loads((old_run / "expected.json").read_text())
    last = read_metrics(old_run)[-1]
    final = loop.train(config_of(old_run), old_run)
    assert final["steps"] == expected["steps"] == 12
    assert final["parameters"] == expected["parameters"]
    resumed = read_metrics(old_run)[-1]
    for numbers, reference in ((final, expected), (resumed, last)):
        for key, value in reference.items():
            if key.startswith(("train/", "eval/", "best/", "alpha/", "grad_norm", "param_norm")):
                np.testing.assert_allclose(numbers[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def config_json(folder, config, **changes):
    """Writes a run's config.json, with `changes`: "a.b" to a value, or None to leave it out."""
    fields = json.loads(config.to_json())
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = fields
        for name in sections:
            section = section[name]
        if value is None:
            del section[last]
        else:
            section[last] = value
    (folder / "config.json").write_text(json.dumps(fields))


OLD = {"version": None, "model.norm": None, "model.base_depth": None, "model.alpha_init": 0.0}
MLP = str(Path(__file__).parents[1] / "configs/mlp.py")


def test_layerscale_of_an_old_run_is_rezero_per_channel(tmp_path):
    """The command that began the run goes on with it, once and again; in a new folder it is CaiT's.

    A run of today does not pass as one of the other rule.
    """
    command = load_config(f"{MLP}:smoke", ["model.residual=layerscale"])
    assert continued(tmp_path / "new", command).model.residual == "layerscale"
    config_json(tmp_path, command, **OLD)
    for _ in range(2):
        for config in (read_config(tmp_path), continued(tmp_path, command)):
            assert config.model.residual == "rezero_channel"
            assert config.model.alpha_init == 0.0
        check_config(tmp_path, command)
        config_json(tmp_path, continued(tmp_path, command))  # as its second start writes
    config_json(tmp_path, load_config(f"{MLP}:smoke", ["model.residual=rezero_channel"]))
    assert continued(tmp_path, command).model.residual == "layerscale"
    with pytest.raises(UserError, match=r"model\.residual: rezero_channel -> layerscale"):
        check_config(tmp_path, command)


def test_an_old_layerscale_checkpoint_resumes_to_the_same_result(tmp_path):
    """Its parameters have the paths and shapes of `rezero_channel`."""
    fields = ["train.epochs=None", "checkpoint.every_steps=2", "mesh.data=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["model.residual=rezero_channel", "model.alpha_init=0.5", *fields]
    expected = loop.train(load_config(f"{MLP}:smoke", [*command, "train.steps=4"]), whole)
    loop.train(load_config(f"{MLP}:smoke", [*command, "train.steps=2"]), parts)
    old = {**OLD, "model.residual": "layerscale", "model.alpha_init": 0.5, "train.steps": 4}
    config_json(parts, read_config(parts), **old)
    (parts / "final.json").unlink()
    command[0] = "model.residual=layerscale"
    final = loop.train(load_config(f"{MLP}:smoke", [*command, "train.steps=4"]), parts)
    assert (final["steps"], final["parameters"]) == (4, expected["parameters"])
    assert final["eval/loss"] == expected["eval/loss"]


@pytest.mark.parametrize("old_run", FAMILIES, indirect=True)
def test_an_old_checkpoint_is_read_for_analysis(old_run):
    model, step, _ = load_model(old_run)
    assert step == 8
    assert model is not None
