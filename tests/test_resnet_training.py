"""ResNets in the training loop: recipes, accumulation, augmentation."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rezero_jax.config import load_config
from rezero_jax.data import Dataset, ResidentSplit
from rezero_jax.data.augment import Augmentation
from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.models.build import make_model
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import model_spec
from rezero_jax.training.step import make_train_step
from rezero_jax.training.trainer import Trainer, augment
from tests import families

CONFIGS = Path(__file__).parents[1] / "configs"
RNG = np.random.default_rng(0)
SMALL = {
    "model.width": 2,
    "model.depth": 8,
    "model.scan": True,  # compiles faster
    "train.epochs": None,
    "train.steps": 6,
    "train.batch_size": 16,
    "train.steps_per_dispatch": 3,
    "eval.every_epochs": None,
    "eval.batch_size": 16,
    "mesh.data": 1,
}


def images(size=64, side=8, classes=10):
    split = ResidentSplit(
        {
            "image": RNG.integers(0, 256, (size, side, side, 3), np.uint8),
            "label": RNG.integers(0, classes, size).astype(np.int32),
        }
    )
    return Dataset("random", split, split, (side, side, 3), classes, (0.5,) * 3, (0.5,) * 3)


DATA = images()


def config(name="resnet", arg="", **fields):
    return families.config(f"{name}.py:{arg}", **(SMALL | fields))


@pytest.mark.slow
def test_accumulation_normalises_each_part_and_moves_the_statistics_once_for_each():
    """As a PyTorch loop that accumulates: gradients averaged, statistics one after another."""
    settings = config()
    make, _ = make_model(settings.model, (8, 8, 3), 10)
    structure = model_spec(make)

    def objective(model, batch, key):
        return {"loss": jnp.square(model(batch["image"])).mean(axis=1)}

    batch = {"image": jnp.asarray(RNG.normal(size=(8, 8, 8, 3)), jnp.float32)}
    settings.optim.unlock()
    settings.optim.groups = {}
    optimizer, _ = make_optimizer(settings.optim, 10, structure)
    state = Trainer(settings, DATA).init()
    state["opt_state"] = optimizer.init(state["params"])

    def step(accumulate):
        return jax.jit(make_train_step(structure, objective, optimizer, accumulate, seed=0))

    both, metrics = step(2)(state, batch)
    # Part j holds every second example from j on.
    parts = [{"image": batch["image"][j::2]} for j in range(2)]
    stats, losses, params = state["stats"], [], []
    for part in parts:
        after, report = step(1)(state | {"stats": stats}, part)
        stats = after["stats"]
        losses.append(float(report["loss"]))
        params.append(after["params"])
    # The first step of SGD is linear in the gradient.
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *params)
    for a, b in zip(*map(jax.tree.leaves, (both["params"], mean)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (both["stats"], stats)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


def test_the_config_turns_each_change_on_for_training_alone():
    fields = {"crop_padding": 3, "flip": True, "jitter": 0.3, "rotation": 20.0}
    program = Trainer(config(**{f"data.{k}": v for k, v in fields.items()}), DATA)
    key, batch = jax.random.key(3), {"image": jnp.asarray(DATA.train.resident["image"][:8])}
    for off in (None, *fields):
        kept = {k: v for k, v in fields.items() if k != off}
        everything = {"crop_padding": 0, "flip": False, "jitter": 0.0, "rotation": 0.0} | kept
        changed = augment(ConfigDict(everything))(batch, key)["image"]
        np.testing.assert_array_equal(changed, Augmentation(**kept)(batch["image"], key))
    nothing = {"data.crop_padding": 0, "data.flip": False}
    assert augment(config(**nothing).data) is None
    plain = Trainer(config(**nothing), DATA)
    assert plain.evaluate(plain.init()) == program.evaluate(program.init())


@pytest.mark.slow
def test_training_sees_augmented_images_that_depend_on_seed_and_step():
    """The step's batch is the augmentation of the gathered one, under a key of (seed, step)."""
    seen = []
    bones = model_spec(make_model(config().model, (8, 8, 3), 10)[0])
    optimizer, _ = make_optimizer(config().optim, 10, bones)
    augmentation = Augmentation(crop_padding=2, flip=True)

    def objective(model, batch, key):
        jax.debug.callback(lambda image: seen.append(np.asarray(image)), batch["image"])
        return {"loss": jnp.square(model(batch["image"].astype(jnp.float32))).mean(axis=1)}

    def change(batch, key):
        return batch | {"image": augmentation(batch["image"], key)}

    batch = {"image": jnp.asarray(RNG.integers(0, 256, (8, 8, 8, 3), np.uint8))}
    state = Trainer(config(), DATA).init()
    for seed, number, accumulate in ((0, 5, 1), (0, 5, 1), (0, 6, 1), (1, 5, 1), (0, 5, 2)):
        step = make_train_step(bones, objective, optimizer, accumulate, seed, change)
        jax.block_until_ready(step(state | {"step": jnp.int32(number)}, batch))
        jax.effects_barrier()
    first, again, later, other, *parts = seen
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, later)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, batch["image"])
    # Splitting the batch does not change what happens to an example.
    assert sorted(p.tobytes() for p in parts) == sorted(first[j::2].tobytes() for j in range(2))


def test_the_papers_recipe_puts_each_parameter_where_the_authors_code_does():
    """Biases (and Fixup's multipliers) at a tenth of the rate, gates as weights; all decayed."""
    for rule in ("rezero", "fixup"):
        settings = config(arg=f"residual={rule}", **{"train.steps": 200})
        structure = model_spec(make_model(settings.model, (32, 32, 3), 10)[0])
        optimizer, schedules = make_optimizer(settings.optim, 200, structure)
        rates = {
            name: [float(schedule(t)) for t in (0, 99, 100, 150)]
            for name, schedule in schedules.items()
        }
        np.testing.assert_allclose(rates["base"], [0.1, 0.1, 0.01, 0.001], rtol=1e-5)
        np.testing.assert_allclose(rates["bias"], [0.01, 0.01, 1e-4, 1e-4], rtol=1e-5)
        if rule == "rezero":
            np.testing.assert_allclose(rates["alpha"], rates["base"])
        params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), structure.shapes)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        for path, update in jax.tree.leaves_with_path(updates):
            text = path_text(path)
            rate = 0.01 if "bias" in text or (rule == "fixup" and "scale" in text) else 0.1
            np.testing.assert_allclose(update, -rate * 5e-4, rtol=1e-5, err_msg=text)


def test_the_notebooks_recipe_has_one_constant_rate_for_all():
    settings = load_config(f"{CONFIGS / 'resnet.py'}:recipe=notebook,lr=0.2")
    optim, data = settings.optim, settings.data
    assert (optim.learning_rate, optim.schedule, optim.weight_decay) == (0.2, "constant", 1e-4)
    assert (dict(optim.groups), optim.alpha.weight_decay) == ({}, None)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    paper = load_config(f"{CONFIGS / 'resnet.py'}:").data
    assert (paper.mean, paper.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert (paper.crop_padding, paper.flip) == (4, True)


def test_the_superconvergence_baseline_has_its_own_longer_cycle():
    settings = load_config(f"{CONFIGS / 'resnet_superconvergence.py'}:residual=residual")
    structure = model_spec(make_model(settings.model, (32, 32, 3), 10)[0])
    assert (settings.train.epochs, structure.parameter_count) == (65.0, 11_171_146)
    _, schedules = make_optimizer(settings.optim, 6370, structure)
    rates = [float(schedules["base"](round(f * 6370))) for f in (0, 0.39, 0.78, 1)]
    np.testing.assert_allclose(rates, [0.048, 1.2, 0.048, 0.00048], rtol=1e-3)
    assert settings.optim.momentum_points == ((0.0, 0.95), (0.39, 0.85), (0.78, 0.95))


def test_superconvergence_cycles_sgd_and_leaves_the_gates_to_a_constant_adagrad():
    settings = load_config(f"{CONFIGS / 'resnet_superconvergence.py'}:")
    structure = model_spec(make_model(settings.model, (32, 32, 3), 10)[0])
    assert structure.parameter_count == 11_171_154
    assert settings.optim.alpha.weight_decay == 0.0
    assert settings.optim.momentum_points == ((0.0, 0.95), (0.1, 0.85), (0.9, 0.95))
    optimizer, schedules = make_optimizer(settings.optim, 4410, structure)
    rates = [float(schedules["base"](t)) for t in (0, 441, 2205, 3969, 4410)]
    np.testing.assert_allclose(rates, [0.032, 1.2, 0.616, 0.032, 0.001], rtol=1e-4)
    assert [float(schedules["alpha"](t)) for t in (0, 441, 4410)] == pytest.approx([0.1] * 3)
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), structure.shapes)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        is_gate = path_text(path) in structure.alpha_paths
        # Adagrad's first step is the rate; SGD's is the rate times gradient and decay.
        expected = -0.1 if is_gate else -0.032 * (1 + 2e-4)
        np.testing.assert_allclose(update, expected, rtol=1e-4, err_msg=path_text(path))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model.depth": 9}, "depth=9 is not 6n [+] 2; the closest depths are 8 and 14"),
        ({"model.family": "prect"}, 'did you mean "preact"'),
        ({"model.residual": "fixxup"}, 'did you mean "fixup"'),
        ({"data.crop_padding": -1}, "data.crop_padding"),
        ({"model.width": 0}, "from 3 to 0 channels is impossible; give at least 1 channel .width"),
        ({"model.batch_norm": False, "model.residual": "zero_gamma"}, "set batch_norm=True"),
    ],
)
def test_mistakes_in_the_config_are_one_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        Trainer(config(**fields), DATA)


def test_an_unknown_recipe_names_the_closest():
    with pytest.raises(UserError, match='did you mean "paper"'):
        config(arg="recipe=papr")
