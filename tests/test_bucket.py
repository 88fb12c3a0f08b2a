"""A workdir in a bucket: the same run to the bit, resumed, read, and refused in one sentence."""

from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from rezero_jax.analysis.plots.curves import write_plot
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.files import copy_folder
from rezero_jax.runs.lock import Lock
from rezero_jax.training import loop
from rezero_jax.training.load import load_language_model
from tests.faults.compare import differences
from tests.gcs.faults import Faults

ROOT = Path(__file__).parents[1]
FIELDS = {
    "mesh.data": 1,
    "train.epochs": None,
    "train.steps": 30,
    "checkpoint.every_steps": 10,
    "eval.every_epochs": None,
    "eval.every_steps": 10,
    "log.every_steps": 5,
}


@pytest.fixture(scope="module")
def config():
    settings = [f"{key}={value}" for key, value in FIELDS.items()]
    return load_config(f"{ROOT / 'configs/mlp.py'}:smoke", settings)


@pytest.fixture(scope="module")
def on_disk(config, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("run"))
    loop.train(config, folder)
    return folder


@pytest.fixture(scope="module")
def in_bucket(server, config):
    folder = epath.Path("gs://runs/whole")
    loop.train(config, folder)
    return folder


def test_a_run_in_a_bucket_has_the_bits_of_one_on_a_disk(in_bucket, on_disk):
    assert differences(in_bucket, on_disk) == []


@pytest.mark.slow
def test_it_resumes_after_a_checkpoint_half_written_whatever_requests_fail(
    in_bucket, server, config, on_disk, capsys
):
    stopped = epath.Path("gs://runs/stopped")
    copy_folder(in_bucket, stopped)
    (stopped / "final.json").unlink()
    (stopped / "checkpoints/30/commit_success.txt").unlink()
    sound, server.faults = server.faults, Faults(0.05, stall=0.1)
    loop.train(config, stopped)
    faults, server.faults = server.faults, sound
    assert sum(faults.count.values()) > 3
    assert "resuming after step 20" in capsys.readouterr().out
    assert differences(stopped, on_disk) == []


def test_it_is_evaluated_and_plotted_there(in_bucket, config, on_disk):
    assert loop.evaluate(config, in_bucket) == loop.evaluate(config, on_disk)
    assert write_plot([in_bucket]) == in_bucket / "curves.png"
    assert (in_bucket / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_language_model_is_read_from_there(server):
    source, copy = epath.Path(ROOT / "tests/reference/runs/transformer"), "gs://runs/transformer"
    copy_folder(source, epath.Path(copy))
    (a, _), (b, _) = load_language_model(copy), load_language_model(source)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(a)),
        nnx.to_pure_dict(nnx.state(b)),
    )


def test_a_second_run_is_refused(server, config):
    held = Lock("gs://runs/held")
    with pytest.raises(UserError, match="another process is training in gs://runs/held"):
        loop.train(config, "gs://runs/held")
    held.release()


@pytest.mark.parametrize(
    ("methods", "status", "said"),
    [
        ("GET POST", 401, "no valid credentials"),
        ("GET POST", 403, "no permission"),
        ("POST", 403, "no permission"),
    ],
)
def test_a_bucket_that_refuses_is_one_sentence(methods, status, said, server, config, monkeypatch):
    monkeypatch.setattr(server, "refusals", dict.fromkeys(methods.split(), status))
    with pytest.raises(UserError, match=f"cannot use gs://runs: {said}"):
        loop.train(config, "gs://runs/refused")


def test_a_bucket_lost_on_the_way_is_one_sentence(server, config, monkeypatch):
    save = Checkpoints.save

    def lose(*args):
        refusals = dict.fromkeys(("GET", "POST", "PUT", "DELETE"), 401)
        monkeypatch.setattr(server, "refusals", refusals)
        save(*args)

    monkeypatch.setattr(Checkpoints, "save", lose)
    with pytest.raises(UserError, match="cannot write to the workdir gs://runs/lost any more"):
        loop.train(config, "gs://runs/lost")


def test_a_bucket_that_does_not_exist_is_one_sentence(server, config):
    with pytest.raises(UserError, match="cannot use gs://none: there is no such bucket; make it"):
        loop.train(config, "gs://none/run")
