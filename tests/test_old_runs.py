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

from rezero_jax.config import base_config
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop
from rezero_jax.training.load import load_model

REFERENCE = Path(__file__).parent / "reference/runs"
FAMILIES = ("mlp", "resnet", "transformer")

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


@pytest.mark.parametrize("old_run", FAMILIES, indirect=True)
def test_an_old_checkpoint_is_read_for_analysis(old_run):
    model, step, _ = load_model(old_run)
    assert step == 8
    assert model is not None
