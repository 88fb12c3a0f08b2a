"""The pure functions of training, without mesh or loop."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rezero_jax.config import base_config
from rezero_jax.data import standardise
from rezero_jax.formatting import path_text
from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet.batch_norm import BatchNorm
from rezero_jax.models.transformer.layer import Encoder
from rezero_jax.training.objective import cross_entropy
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import init_state, model_spec
from rezero_jax.training.step import (
    make_dispatch,
    make_eval_step,
    make_train_step,
)
from tests.families import REMEMBER, flat

DEPTH = 3
BATCH = 16
GO = jnp.zeros(3, jnp.int32)  # no device stops
EPS = float(jnp.finfo(jnp.float32).eps)


def flat_pixels(batch):
    images = standardise(batch["image"], mean=(0.5,), std=(0.5,))
    return batch | {"image": images.reshape(len(images), -1)}


def objective(model, batch, key):
    return cross_entropy(model, flat_pixels(batch), key, classes=10)


@cache
def make_model(residual="rezero", depth=DEPTH, **kwargs):
    return lambda rngs: MLP(16, 8, depth, 10, residual, rngs=rngs, **kwargs)


def batches(count, seed=0):
    """`count` batches on a leading axis."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, BATCH, 4, 4, 1), np.uint8)
    labels = rng.integers(0, 10, (count, BATCH), np.int32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(labels)}


def first(many):
    return jax.tree.map(lambda leaf: leaf[0], many)


@cache
def start(make, optimizer):
    return jax.jit(partial(init_state, make, optimizer))(jax.random.key(1))


def adagrad(spec):
    return make_optimizer(base_config().optim, 100, spec)[0]


@cache
def remembering_step(make, accumulate):
    return jax.jit(make_train_step(model_spec(make), objective, REMEMBER, accumulate, seed=0))


def by_hand(spec, state, batch):
    """The mean loss and the accuracy of a batch, in float64."""
    images, label = batch["image"], np.asarray(batch["label"])
    model = spec.model(state["params"], state["stats"])
    logits = np.asarray(model(images.reshape(len(images), 16) / 127.5 - 1), np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(images)), label]
    return losses.mean(), np.mean(logits.argmax(1) == label)


def gradients(make, params=None, accumulate=1):
    """Exact gradients (path -> array) and the metrics of a step, at `params` or at the start."""
    state = dict(start(make, REMEMBER))
    if params is not None:
        state["params"] = params
    state, metrics = remembering_step(make, accumulate)(state, first(batches(1)))
    return flat(state["opt_state"]), metrics


@pytest.fixture(scope="module")
def rezero():
    """(spec, train_step, state) of a ReZero net with Adagrad."""
    make = make_model()
    spec = model_spec(make)
    optimizer = adagrad(spec)
    state = start(make, optimizer)
    return spec, jax.jit(make_train_step(spec, objective, optimizer, 1, seed=0)), state


@pytest.fixture(scope="module")
def steps(rezero):
    """A dispatch under jit, whose batches are fetched whole."""
    spec, train_step, _ = rezero
    schedules = {"base": lambda step: 0.5 * step}
    return jax.jit(make_dispatch(train_step, lambda _, fetched: fetched, spec, schedules))


def test_metrics_belong_to_the_parameters_before_the_update(rezero):
    spec, train_step, state = rezero
    batch = first(batches(1))
    after, metrics = train_step(state, batch)
    assert (state["step"], after["step"]) == (0, 1)
    loss, accuracy = by_hand(spec, state, batch)
    assert by_hand(spec, after, batch)[0] < loss
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics["accuracy"] == accuracy
    grads, _ = gradients(make_model())
    norm = np.sqrt(sum(np.sum(np.square(grad, dtype=np.float64)) for grad in grads.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)


@pytest.mark.guarantee("step")
def test_accumulated_gradients_are_those_of_the_whole_batch(rezero):
    _, train_step, state = rezero
    params = train_step(state, first(batches(1)))[0]["params"]  # where no gradient is zero
    whole, whole_metrics = gradients(make_model(), params)
    averaged, averaged_metrics = gradients(make_model(), params, accumulate=4)
    for path, grad in whole.items():
        # A sum over 16 examples in another order: errors of some eps of the largest term.
        np.testing.assert_allclose(averaged[path], grad, rtol=0, atol=16 * EPS * np.abs(grad).max())
        assert np.abs(grad).max() > 0
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(averaged_metrics[name], value, rtol=16 * EPS)


def test_each_microbatch_moves_the_running_statistics_once():
    def objective(model, batch, key):
        return {"loss": model(batch["x"]).sum(axis=-1)}

    def make(rngs):
        return BatchNorm(3)

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    train_step = make_train_step(model_spec(make), objective, REMEMBER, 2, seed=0)
    state, _ = train_step(start(make, REMEMBER), {"x": jnp.asarray(x)})
    mean = np.zeros(3)
    for j in range(2):  # microbatch j has every second example from j on
        mean += 0.1 * (x[j::2].mean(axis=0) - mean)
    np.testing.assert_allclose(state["stats"]["mean"], mean, rtol=1e-4, atol=1e-6)


@pytest.mark.guarantee("step")
def test_groups_of_steps_give_the_bits_of_single_steps(rezero, steps):
    _, _, begin = rezero
    three = batches(3)
    together, report = steps(begin, {}, three, jnp.int32(3), GO)
    apart, losses = begin, []
    for i in range(3):
        # Only the first slot counts; the others hold other examples.
        fetched = jax.tree.map(lambda a, b, i=i: a.at[0].set(b[i]), batches(3, seed=9), three)
        apart, one = steps(apart, {}, fetched, jnp.int32(1), GO)
        losses.append(one["loss"][0])
        np.testing.assert_array_equal(one["loss"][1:], 0)
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    np.testing.assert_array_equal(report["loss"], losses)
    assert len(set(map(float, losses))) == 3
    assert steps._cache_size() == 1  # one compilation serves every count


def test_the_report_ends_with_the_state_after_the_last_update(rezero, steps):
    spec, _, begin = rezero
    state, report = steps(begin, {}, batches(3), jnp.int32(2), jnp.array([0, 15, 2], jnp.int32))
    assert report["stop"] == 15  # the largest of the devices
    np.testing.assert_array_equal(report["alphas"], spec.alphas(state["params"]))
    leaves = jax.tree.leaves(state["params"])
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))
    np.testing.assert_allclose(report["param_norm"], norm, rtol=1e-6)
    assert report["learning_rate/base"] == 0.5  # 0.5 * step, of the second update: step 1


def test_randomness_is_a_function_of_seed_and_step(rezero):
    spec, _, begin = rezero

    def random_loss(model, batch, key):
        return objective(model, batch, key) | {"draw": jax.random.uniform(key, (BATCH,))}

    def draws(seed, microbatches=1):
        step = jax.jit(make_train_step(spec, random_loss, adagrad(spec), microbatches, seed))
        state, drawn = begin, []
        for _ in range(3):
            state, metrics = step(state, first(batches(1)))
            drawn.append(float(metrics["draw"]))
        resumed = begin | {"step": jnp.int32(2)}
        assert float(step(resumed, first(batches(1)))[1]["draw"]) == drawn[2]
        return drawn

    assert len({*draws(0), *draws(1)}) == 6
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 2), 4)
    each = [jax.random.uniform(key, (BATCH,)).mean() for key in keys]  # each microbatch its own
    np.testing.assert_allclose(draws(0, 4)[2], np.mean(each), rtol=1e-6)


def test_a_classifier_whose_call_takes_rngs_gets_them():
    def losses(model, seed):
        return objective(model, first(batches(1)), jax.random.key(seed))["loss"]

    class Random:
        def __call__(self, x, *, rngs=None):
            return jax.random.normal(rngs.dropout(), (len(x), 10))

    class Fixed:
        def __call__(self, x):
            return x[:, :10]

    np.testing.assert_array_equal(losses(Random(), 0), losses(Random(), 0))
    assert not np.array_equal(losses(Random(), 0), losses(Random(), 1))
    np.testing.assert_array_equal(losses(Fixed(), 0), losses(Fixed(), 1))


@pytest.mark.parametrize("scan", [True, False])
def test_alphas_are_in_the_order_of_layers_and_sublayers(scan):
    depth = 12  # more than ten: "10" sorts before "2"
    values = jnp.arange(2 * depth, dtype=jnp.float32).reshape(depth, 2) + 0.5

    def make_encoder(rngs):
        return Encoder(8, depth, 2, feedforward=8, alpha_per="sublayer", scan=scan, rngs=rngs)

    for make, expected in (
        (make_model(depth=depth, scan=scan), values[:, 0]),
        (make_encoder, values.reshape(-1)),
    ):
        spec = model_spec(make)

        def fill(path, leaf):
            text = path_text(path)
            if "alpha" not in text:
                return jnp.zeros(leaf.shape)
            sublayer = 1 if "rules/1" in text else 0
            return values[:, sublayer] if scan else values[int(text.split("/")[2]), sublayer]

        params = jax.tree.map_with_path(fill, spec.shapes)
        np.testing.assert_array_equal(spec.alphas(params), expected)


def test_a_gate_per_channel_is_reported_by_its_mean_size_and_no_gate_by_nothing():
    spec = model_spec(make_model("rezero_channel"))
    gates = jnp.asarray(np.random.default_rng(0).normal(size=(DEPTH, 8)), jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), spec.shapes)
    params["trunk"]["blocks"]["rule"]["alpha"] = gates
    np.testing.assert_allclose(spec.alphas(params), np.abs(gates).mean(1), rtol=4 * EPS)
    none = model_spec(make_model("residual"))
    assert none.alphas(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), none.shapes)).shape == (0,)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_evaluation_counts_every_example_once(batch_size):
    size = 10
    make = make_model()
    spec = model_spec(make)
    state = start(make, REMEMBER)
    examples = jax.tree.map(lambda leaf: leaf[:size], first(batches(1)))

    def gather(resident, fetched):
        return jax.tree.map(lambda leaf: leaf[fetched["index"]], resident)

    evaluate = jax.jit(make_eval_step(spec, objective, gather))
    sums = {"loss": 0.0, "accuracy": 0.0, "weight": 0.0}
    for low in range(0, size, batch_size):
        positions = np.arange(low, low + batch_size)
        mask = positions < size
        fetched = {"index": jnp.asarray(np.where(mask, positions, 0))}
        one = evaluate(state, examples, fetched, jnp.asarray(mask))
        sums = {name: sums[name] + float(one[name]) for name in sums}

    loss, accuracy = by_hand(spec, state, examples)
    np.testing.assert_allclose(sums["loss"] / size, loss, rtol=1e-5)
    assert (sums["accuracy"] / size, sums["weight"]) == (accuracy, size)
