"""Families in training: objectives, evaluation, microbatches, meshes, configs, mistakes."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rezero_jax import Transformer
from rezero_jax.data import Dataset, ResidentSplit, Text, TextSplit
from rezero_jax.data.augment import Augmentation, augment
from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.models.build import make_model
from rezero_jax.training.objective import language_modelling
from rezero_jax.training.optim import _labels, make_optimizer
from rezero_jax.training.state import model_spec
from rezero_jax.training.step import make_train_step
from rezero_jax.training.trainer import Trainer
from tests.families import REMEMBER, config, drawn, flat, tokens, train

RNG = np.random.default_rng(0)
SENTENCE = b"the quick brown fox jumps over the lazy dog, and then it sleeps in the sun. "
SHORT = {
    "train.epochs": None,
    "train.steps": 6,
    "train.batch_size": 16,
    "train.steps_per_dispatch": 3,
    "eval.every_epochs": None,
    "eval.batch_size": 16,
    "mesh.data": 1,
}
RESNET = SHORT | {"model.width": 2, "model.depth": 8, "model.scan": True}
LANGUAGE = SHORT | {
    "eval.every_steps": None,
    "model.width": 8,
    "model.heads": 2,
    "model.max_len": 8,
    "train.batch_size": 8,
}


def images(shape=(8, 8, 3), size=64, classes=10):
    arrays = {
        "image": RNG.integers(0, 256, (size, *shape), np.uint8),
        "label": RNG.integers(0, classes, size).astype(np.int32),
    }
    split, channels = ResidentSplit(arrays), shape[-1]
    return Dataset("random", split, split, shape, classes, (0.5,) * channels, (0.5,) * channels)


IMAGES = images()


def text(train=SENTENCE * 10, held=SENTENCE, length=8, context=0, random=False):
    return Text(
        "tiny",
        TextSplit(np.frombuffer(train, np.uint8), length, random=random),
        TextSplit(np.frombuffer(held, np.uint8), length, context, whole=True),
    )


def resnet(arg="", **fields):
    return config(f"resnet.py:{arg}", **(RESNET | fields))


def language(arg="depth=2", **fields):
    return config(f"transformer_small.py:{arg}", **(LANGUAGE | fields))


def vit(arg="smoke", **fields):
    steps = {"train.steps": 6, "train.steps_per_dispatch": 3, "mesh.data": 1}
    return config(f"vit.py:{arg}", **(steps | fields))


# ---- Meshes

FULL = {"mesh.data": 4, "mesh.model": 2, "mesh.fully_sharded": True}
LAMB = {  # Without biases: the keys' bias has only rounding as its gradient, which LAMB blows up.
    "model.bias": False,
    "model.dropout": 0.2,
    "optim.name": "lamb",
    "optim.learning_rate": 0.02,
    "optim.weight_decay": 0.01,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "fields", "mesh"),
    [
        pytest.param(language, LAMB, {"mesh.data": 4}, id="transformer_dropout_lamb"),
        pytest.param(vit, {"optim.name": "muon"}, FULL, id="vit_muon_full"),
    ],
)
def test_everything_random_and_every_optimizer_is_the_same_on_any_mesh(make, fields, mesh):
    found = []
    for places in ({}, mesh):
        settings = make(**(fields | places))
        trainer = Trainer(settings, text(random=True) if make is language else None)
        losses, state = train(trainer)
        found.append((losses, flat((state["params"], state["stats"]))))
    (losses, one), (many_losses, many) = found
    np.testing.assert_allclose(many_losses, losses, rtol=2e-5)
    for path, value in one.items():
        # Where a gradient is near zero, Adam makes much of its rounding.
        np.testing.assert_allclose(many[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


# ---- ResNets: microbatches and augmentation


def test_the_config_turns_each_augmentation_on_for_training_alone():
    fields = {"crop_padding": 3, "flip": True, "jitter": 0.3, "rotation": 20.0}
    settings = config("mlp.py:smoke", **SHORT, **{f"data.{k}": v for k, v in fields.items()})
    trainer = Trainer(settings, IMAGES)
    key, batch = jax.random.key(3), {"image": jnp.asarray(IMAGES.train.arrays["image"][:8])}
    changed = jax.jit(augment(ConfigDict(fields)))(batch, key)["image"]
    expected = jax.jit(Augmentation(**fields))(batch["image"], key)
    np.testing.assert_array_equal(changed, expected)
    assert augment(resnet(**{"data.crop_padding": 0, "data.flip": False}).data) is None
    plain = Trainer(config("mlp.py:smoke", **SHORT), IMAGES)
    state = plain.init()
    assert plain.evaluate(state) == trainer.evaluate(state)
    assert train(plain, 1)[0] != train(trainer, 1)[0]


def test_training_sees_augmented_images_that_depend_on_seed_and_step():
    seen = []
    spec = model_spec(make_model(config("mlp.py:smoke").model, (8, 8, 3), 10)[0])

    def objective(model, batch, key):
        jax.debug.callback(lambda image: seen.append(np.asarray(image)), batch["image"])
        inputs = batch["image"].astype(jnp.float32).reshape(-1, 192)
        return {"loss": jnp.square(model(inputs)).mean(axis=1)}

    change = augment(resnet(**{"data.crop_padding": 2, "data.flip": True}).data)
    batch = {"image": jnp.asarray(RNG.integers(0, 256, (8, 8, 8, 3), np.uint8))}
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), spec.shapes)
    state = {"params": params, "stats": {}, "opt_state": REMEMBER.init(params)}
    for seed, count, numbers in ((0, 1, (5, 5, 6)), (1, 1, (5,)), (0, 2, (5,))):
        step = jax.jit(make_train_step(spec, objective, REMEMBER, count, seed, change))
        for number in numbers:
            jax.block_until_ready(step(state | {"step": jnp.int32(number)}, batch))
            jax.effects_barrier()
    first, again, later, other, *halves = seen
    np.testing.assert_array_equal(first, again)
    for different in (later, other, batch["image"]):
        assert not np.array_equal(first, different)
    # Microbatches do not change what happens to an example.
    assert sorted(h.tobytes() for h in halves) == sorted(first[j::2].tobytes() for j in range(2))


# ---- Language models: objective, evaluation, dropout


def test_the_objective_is_the_mean_over_the_bytes_that_count():
    inputs, targets = tokens((2, 3, 7), 13)
    model = drawn(partial(Transformer, 13, 8, 3, 2, 16))
    logits = np.asarray(jax.jit(lambda m: m(inputs))(model), np.float64)
    nats = np.log(np.exp(logits).sum(axis=-1))
    nats -= np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
    weight = np.array([[0, 0, 1, 1, 1, 0, 1], [0] * 7, [1] * 7])
    for weights, counted in ((None, [7, 7, 7]), (weight, [4, 0, 7])):
        batch = {"tokens": inputs, "targets": targets}
        if weights is not None:
            batch["weight"] = jnp.asarray(weights, jnp.float32)
        values = jax.jit(language_modelling)(model, batch, jax.random.key(0))
        expected = (nats * (1 if weights is None else weights)).sum(axis=1) / np.maximum(counted, 1)
        np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(values["bits_per_byte"], expected / math.log(2), rtol=1e-5)
    np.testing.assert_array_equal(values["weight"], [4, 0, 7])


def test_an_evaluation_scores_every_byte_once_given_its_window():
    count, context, length = 45, 3, 8
    held = RNG.integers(0, 256, count, np.uint8)
    settings = language(**{"model.dropout": 0.5, "eval.batch_size": 4})
    trainer = Trainer(settings, text(held=held.tobytes(), context=context))
    assert trainer.dataset.eval.size % 4 != 0
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, jnp.float32), trainer.spec.shapes
    )
    evaluation = trainer.evaluate({"params": params, "stats": {}})

    model = trainer.spec.model(params, {})
    model.eval()
    forward, nats = jax.jit(lambda tokens: model(tokens)), []
    before = [0, *held]
    for place in range(count):
        # Windows that each score the next `scored` bytes, moved to be within the text.
        scored = length - context
        start = max(0, min(place // scored * scored - context, count - length))
        window = jnp.asarray([before[start : start + length]], jnp.int32)
        logits = np.asarray(forward(window)[0, place - start], np.float64)
        nats.append(np.log(np.exp(logits).sum()) - logits[held[place]])
    assert np.std(nats) > 0.5
    assert set(evaluation) == {"eval/loss", "eval/bits_per_byte"}
    np.testing.assert_allclose(evaluation["eval/loss"], np.mean(nats), rtol=1e-5)
    bits = np.mean(nats) / math.log(2)
    np.testing.assert_allclose(evaluation["eval/bits_per_byte"], bits, rtol=1e-5)


# ---- Configs


def spec_of(settings, shape=(32, 32, 3)):
    return model_spec(make_model(settings.model, shape, 10)[0])


def first_updates(settings, spec, steps, gradient):
    """The schedules, and the first updates of parameters of 1 for gradients of this size."""
    optimizer, schedules = make_optimizer(settings.optim, steps, spec)

    @jax.jit
    def update():
        params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), spec.shapes)
        grads = jax.tree.map(lambda leaf: gradient * leaf, params)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    return schedules, flat(update())


@pytest.mark.parametrize("rule", ["rezero", "fixup"])
def test_the_papers_resnet_recipe_puts_each_parameter_where_the_authors_code_does(rule):
    """Biases (and Fixup's multipliers) at a tenth of the rate, gates as weights; all decayed."""
    settings = resnet(f"residual={rule}", **{"train.steps": 200})
    schedules, updates = first_updates(settings, spec_of(settings), 200, 0.0)
    rates = {name: [float(s(t)) for t in (0, 99, 100, 150)] for name, s in schedules.items()}
    np.testing.assert_allclose(rates["base"], [0.1, 0.1, 0.01, 0.001], rtol=1e-5)
    np.testing.assert_allclose(rates["bias"], [0.01, 0.01, 1e-4, 1e-4], rtol=1e-5)
    if rule == "rezero":
        np.testing.assert_allclose(rates["alpha"], rates["base"])
    for path, update in updates.items():
        rate = 0.01 if "bias" in path or (rule == "fixup" and "scale" in path) else 0.1
        np.testing.assert_allclose(update, -rate * 5e-4, rtol=1e-5, err_msg=path)


def test_superconvergence_cycles_sgd_and_leaves_the_gates_to_a_constant_adagrad():
    for rule, steps, count, ramp, places, rates in (
        (
            *("rezero", 4410, 11_171_154, (0.1, 0.9)),
            *((0, 441, 2205, 3969, 4410), [0.032, 1.2, 0.616, 0.032, 0.001]),
        ),
        (
            *("residual", 6370, 11_171_146, (0.39, 0.78)),
            *((0, 2484, 4969, 6370), [0.048, 1.2, 0.048, 0.00048]),
        ),
    ):
        settings = config(f"resnet_superconvergence.py:residual={rule}")
        spec, points = spec_of(settings), settings.optim.momentum_points
        assert (settings.train.epochs, spec.parameter_count) == (steps / 98, count)
        assert points == ((0.0, 0.95), (ramp[0], 0.85), (ramp[1], 0.95))
        settings.model.width = 2
        spec = spec_of(settings)
        schedules, updates = first_updates(settings, spec, steps, 1.0)
        found = [float(schedules["base"](step)) for step in places]
        np.testing.assert_allclose(found, rates, rtol=1e-3)
        for path, update in updates.items():
            # Adagrad's first step is the rate; SGD's is the rate times gradient and decay.
            is_gate = spec.parameters[path].is_gate
            expected = -0.1 if is_gate else -rates[0] * (1 + 2e-4)
            np.testing.assert_allclose(update, expected, rtol=1e-4, err_msg=path)


@pytest.mark.guarantee("optimizer groups")
def test_of_a_vit_matrices_alone_decay_and_gates_are_a_group():
    for settings in (vit("smoke,residual=pre_norm", **{"model.pool": "token"}), vit()):
        spec = spec_of(settings, (8, 8, 1))
        labels = jax.tree.leaves_with_path(_labels(settings.optim, spec))
        for path, label in ((path_text(path), label) for path, label in labels):
            is_matrix = "kernel" in path or path.endswith("qkv")
            assert label == ("base" if is_matrix else "alpha" if "alpha" in path else "vectors")
        assert settings.optim.groups.vectors.weight_decay == 0
        assert settings.optim.alpha.weight_decay == 0


def test_a_vits_final_norm_follows_the_rule_however_it_is_set():
    for residual, has_norm in (("rezero", False), ("pre_norm", True)):
        for settings in (vit(f"smoke,residual={residual}"), vit(**{"model.residual": residual})):
            assert ("norm" in spec_of(settings, (8, 8, 1)).shapes) is has_norm


# ---- Mistakes, beside those of test_bad_input.py


def test_mistakes_in_a_config_are_one_sentence():
    for make, fields, dataset, words in (
        (resnet, {"model.family": "prect"}, IMAGES, '"preact"'),
        (language, {"model.vocab_size": 122}, text(), r"model\.vocab_size=122"),
        (vit, {"train.batch_size": 16}, images((4, 16, 1)), "a ViT .* 4 x 16"),
    ):
        with pytest.raises(UserError, match=words) as info:
            Trainer(make(**fields), dataset)
        assert "\n" not in str(info.value)
    for spec, words in (
        ("resnet.py:recipe=papr", '"paper"'),
        ("transformer_enwik8.py:depth=24", '"24".* 12, 128, 64'),
    ):
        with pytest.raises(UserError, match=words):
            config(spec)
