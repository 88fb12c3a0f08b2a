"""Vision Transformers in the training loop: devices, resume, groups, mistakes."""

import shutil
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.models.build import make_model
from rezero_jax.training import loop
from rezero_jax.training.optim import _labels
from rezero_jax.training.state import model_spec
from rezero_jax.training.trainer import Trainer

VIT = str(Path(__file__).parents[1] / "configs" / "vit.py")
STEPS = {"train.steps": 6, "train.steps_per_dispatch": 3, "mesh.data": 1}


def config(arg="smoke", **fields):
    return load_config(f"{VIT}:{arg}", [f"{k}={v}" for k, v in (STEPS | fields).items()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of six updates, saved after the third and the sixth."""
    folder = tmp_path_factory.mktemp("whole")
    loop.train(config(**{"checkpoint.every_steps": 3}), folder)
    return folder


def saved(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoints" / "6" / "state")


def test_resume_gives_the_same_bits_with_augmentation_and_adamw(whole, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    (stopped / "final.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "6")  # as if it had been killed after step 3
    loop.train(config(**{"checkpoint.every_steps": 3}), stopped)
    a, b = saved(whole), saved(stopped)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path_text(path))


FULL = {"mesh.data": 4, "mesh.model": 2, "mesh.fully_sharded": True}


def trained(**fields):
    """The parameters after six updates, path -> array."""
    program = Trainer.from_config(config(**fields))
    state, batches = program.init(), program.batches(0)
    for _ in range(2):
        state, _ = program.dispatch(state, list(islice(batches, 3)))
    return flat(state["params"])


def flat(tree):
    return {path_text(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("mesh", [{"mesh.data": 8}, pytest.param(FULL, marks=pytest.mark.slow)])
def test_eight_devices_train_the_same_as_one(whole, mesh):
    one = flat(saved(whole)["params"])
    for path, many in trained(**mesh).items():
        # Where a gradient is near zero, Adam makes much of its rounding.
        np.testing.assert_allclose(many, one[path], rtol=1e-4, atol=2e-6, err_msg=path)


@pytest.mark.slow
def test_muon_on_a_mesh_moves_as_on_one_device():
    one = trained(**{"optim.name": "muon"})
    for path, many in trained(**{"optim.name": "muon"} | FULL).items():
        np.testing.assert_allclose(many, one[path], rtol=1e-4, atol=5e-6, err_msg=path)


def test_matrices_alone_decay_and_gates_are_a_group():
    normed = config("smoke,residual=pre_norm", **{"model.pool": "token"})
    for settings in (normed, config()):
        spec = model_spec(make_model(settings.model, (8, 8, 1), 10)[0])
        labels = jax.tree.leaves_with_path(_labels(settings.optim, spec))
        for (path, label), leaf in zip(labels, jax.tree.leaves(spec.shapes), strict=True):
            name = path_text(path)
            matrix = "kernel" in name or name.endswith("qkv")
            expected = "base" if matrix else "alpha" if "alpha" in name else "vectors"
            assert label == expected, (name, leaf.shape)
        assert settings.optim.groups.vectors.weight_decay == 0
        assert settings.optim.alpha.weight_decay == 0


@pytest.mark.parametrize(("residual", "has_norm"), [("rezero", False), ("pre_norm", True)])
def test_the_final_norm_follows_the_rule_however_it_is_set(residual, has_norm):
    for settings in (
        config(f"smoke,residual={residual}"),
        config(**{"model.residual": residual}),
    ):
        spec = model_spec(make_model(settings.model, (8, 8, 1), 10)[0])
        assert ("norm" in spec.shapes) is has_norm


def test_images_that_are_not_square():
    with pytest.raises(UserError, match=r"model\.name=vit takes square images, not 4 x 16"):
        make_model(config().model, (4, 16, 1), 10)
