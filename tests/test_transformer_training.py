"""Language models in the training loop: objective, evaluation, configs, LAMB."""

import functools
import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from rezero_jax.config import base_config, load_config
from rezero_jax.data import Dataset, ResidentSplit, Text, TextSplit
from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.models.build import make_language_model
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import init_state, model_spec
from rezero_jax.training.step import language_modelling, make_train_step
from rezero_jax.training.trainer import Trainer
from tests import families
from tests.test_transformer import (
    TARGETS,
    TOKENS,
    flat,
    some_params,
    structure_of,
    unrolled,
)

CONFIGS = Path(__file__).parents[1] / "configs"
RNG = np.random.default_rng(0)
SENTENCE = b"the quick brown fox jumps over the lazy dog, and then it sleeps in the sun. "
SMALL = {
    "model.width": 8,
    "model.heads": 2,
    "model.max_len": 8,
    "train.steps": 6,
    "train.batch_size": 8,
    "train.steps_per_dispatch": 3,
    "eval.every_steps": None,
    "eval.batch_size": 16,
    "log.every_steps": 3,
    "checkpoint.every_steps": 3,
    "mesh.data": 1,
}


def text(train=SENTENCE * 10, held=SENTENCE, length=8, context=0, random=False):
    return Text(
        "tiny",
        TextSplit(np.frombuffer(train, np.uint8), length, random=random),
        TextSplit(np.frombuffer(held, np.uint8), length, context, whole=True),
    )


def config(arg="depth=2", name="transformer_small", **fields):
    return families.config(f"{name}.py:{arg}", **(SMALL | fields))


# ---- What is minimised, and what is measured


BATCH = {"tokens": TOKENS, "targets": TARGETS}


def test_the_objective_is_the_mean_over_the_bytes_that_count():
    structure = structure_of()
    model = structure.model(some_params(structure), {})
    logits = np.asarray(jax.jit(lambda m: m(TOKENS))(model), np.float64)
    nats = np.log(np.exp(logits).sum(axis=-1))
    nats -= np.take_along_axis(logits, np.asarray(TARGETS)[..., None], axis=-1)[..., 0]
    weight = np.array([[0, 0, 1, 1, 1, 0, 1], [0] * 7, [1] * 7])
    for weights, counted in ((None, [7, 7, 7]), (weight, [4, 0, 7])):
        more = {} if weights is None else {"weight": jnp.asarray(weights, jnp.float32)}
        values = jax.jit(language_modelling)(model, BATCH | more, jax.random.key(0))
        assert set(values) == {"loss", "bits_per_byte", *more}
        expected = (nats * (1 if weights is None else weights)).sum(axis=1) / np.maximum(counted, 1)
        np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(values["bits_per_byte"], expected / math.log(2), rtol=1e-5)
    np.testing.assert_array_equal(values["weight"], [4, 0, 7])


@pytest.mark.parametrize(("count", "context"), [(45, 0), (45, 3), (13, 7)])
def test_an_evaluation_scores_every_byte_once_given_its_window(count, context):
    length, held = 8, RNG.integers(0, 256, count, np.uint8)
    settings = config(**{"model.dropout": 0.5, "eval.batch_size": 4})
    program = Trainer(settings, text(held=held.tobytes(), context=context))
    assert program._eval.size % 4 != 0
    params = some_params(program.spec)
    evaluation = program.evaluate({"params": params, "stats": {}})

    model = program.spec.model(params, {})
    model.eval()
    forward, nats = jax.jit(lambda tokens: model(tokens)), []
    before = [0, *held]
    for place in range(count):
        # Windows that each score the next `scored` bytes, moved to lie within the text.
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


# ---- Updates


# Instead of updating the parameters, keeps the gradients as its state, exactly.
REMEMBER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def test_accumulation_averages_parts_that_are_dropped_out_each_in_its_own_way():
    structure = structure_of(dropout=0.3)
    params, rng = some_params(structure), np.random.default_rng(1)
    tokens, targets = jnp.asarray(rng.integers(0, 13, (2, 4, 7)), jnp.int32)
    state = {"step": jnp.int32(5), "params": params, "stats": {}, "opt_state": None}
    step = jax.jit(make_train_step(structure, language_modelling, REMEMBER, 2, seed=3))
    after, metrics = step(state, {"tokens": tokens, "targets": targets})

    @jax.jit
    def part(tokens, targets, key):
        def loss(params):
            batch = {"tokens": tokens, "targets": targets}
            return language_modelling(structure.model(params, {}), batch, key)["loss"].mean()

        return jax.value_and_grad(loss)(params)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 5), 2)
    # Part j holds every second example from j on.
    (loss0, grads0), (loss1, grads1) = (
        part(tokens[j::2], targets[j::2], keys[j]) for j in range(2)
    )
    np.testing.assert_allclose(metrics["loss"], (loss0 + loss1) / 2, rtol=1e-5)
    bits = (loss0 + loss1) / 2 / math.log(2)
    np.testing.assert_allclose(metrics["bits_per_byte"], bits, rtol=1e-5)
    for (path, a), b, c in zip(
        jax.tree.leaves_with_path(after["opt_state"]),
        jax.tree.leaves(grads0),
        jax.tree.leaves(grads1),
        strict=True,
    ):
        np.testing.assert_allclose(a, (b + c) / 2, rtol=1e-4, atol=1e-6, err_msg=path_text(path))
    assert abs(float(part(tokens[1::2], targets[1::2], keys[0])[0] - loss1)) > 1e-3


def test_lamb_on_a_scanned_transformer_is_lamb_on_its_unrolled_twin():
    settings = base_config().optim
    settings.update({"name": "lamb", "learning_rate": 0.05, "weight_decay": 0.01})
    before = some_params(structure_of(bias=False))
    after, losses = [], []
    for scan in (True, False):
        structure = structure_of(bias=False, scan=scan)
        optimizer, _ = make_optimizer(settings, 10, structure)
        step = jax.jit(make_train_step(structure, language_modelling, optimizer, 1, seed=0))
        params = before if scan else unrolled(before)
        state = {"step": jnp.int32(0), "params": params, "stats": {}}
        state["opt_state"] = jax.jit(optimizer.init)(params)
        for _ in range(3):
            state, metrics = step(state, BATCH)
            losses.append(metrics["loss"])
        after.append(flat(unrolled(state["params"]) if scan else state["params"]))
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-5)
    assert after[0].keys() == after[1].keys()
    for path, value in flat(unrolled(before)).items():
        np.testing.assert_allclose(after[0][path], after[1][path], rtol=1e-4, atol=1e-5)
        # Three steps of 0.05 of each tensor's own norm, to and fro.
        assert 0.02 < np.linalg.norm(after[0][path] - value) / np.linalg.norm(value) < 0.16, path


def test_a_small_model_learns_a_sentence_by_heart():
    fields = {"model.width": 32, "model.max_len": 32, "optim.learning_rate": 0.01}
    settings = config(**fields, **{"train.steps": 120, "train.steps_per_dispatch": 40})
    program = Trainer(settings, text(length=32, random=True))
    losses, state = families.train(program)
    assert abs(losses[0] / math.log(2) - 8) < 0.2
    bits = program.evaluate(state)["eval/bits_per_byte"]
    letters, pairs = Counter(SENTENCE), Counter(pairwise(SENTENCE))
    count = len(SENTENCE)
    of_one = -sum(n / count * math.log2(n / count) for n in letters.values())
    given_one = -sum(n / count * math.log2(n / letters[a]) for (a, _), n in pairs.items())
    assert bits < 0.4 < given_one < of_one


# ---- Configs


@pytest.mark.parametrize(
    ("layers", "width", "batch", "rate", "epochs"),
    [
        (12, 512, 1080, 0.016, 130.0),
        (64, 256, 304, 0.00872, 100.0),
        (128, 256, 144, 0.0060, 100.0),
    ],
)
def test_the_papers_settings(layers, width, batch, rate, epochs):
    settings = load_config(f"{CONFIGS / 'transformer_enwik8.py'}:layers={layers}")
    model, optim, data = settings.model, settings.optim, settings.data
    assert (model.depth, model.width, model.heads, model.feedforward) == (layers, width, 2, None)
    assert (model.residual, model.alpha_init, model.alpha_per) == ("rezero", None, "layer")
    assert (model.dropout, model.activation, model.vocab_size) == (0.2, "gelu", 256)
    assert (data.name, data.length, model.max_len) == ("enwik8", 512, 512)
    assert (settings.train.batch_size, settings.train.epochs) == (batch, epochs)
    assert (optim.name, optim.schedule, optim.warmup_steps) == ("lamb", "constant", 0)
    assert optim.learning_rate == pytest.approx(rate, rel=3e-3)
    assert batch % settings.train.accumulate == 0


def test_arguments_reach_the_config_of_the_paper():
    arg = "residual=post_norm,warmup=100,alpha_init=1.0,accumulate=1,epochs=2.5"
    settings = load_config(f"{CONFIGS / 'transformer_enwik8.py'}:{arg}")
    assert (settings.model.residual, settings.model.alpha_init) == ("post_norm", 1.0)
    assert (settings.optim.warmup_steps, settings.optim.learning_rate) == (100, 0.016)
    assert (settings.train.accumulate, settings.train.epochs) == (1, 2.5)
    with pytest.raises(UserError, match='unknown number of layers "24"; choose one of 12, 128, 64'):
        load_config(f"{CONFIGS / 'transformer_enwik8.py'}:layers=24")


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("transformer_enwik8", "smoke,warmup=100"),
        ("transformer_notebook", "smoke"),
        ("transformer_reduced", "smoke"),
    ],
)
def test_every_config_trains(name, arg, tmp_path):
    """transformer_small does so above and in test_sample."""
    (tmp_path / "book.txt").write_bytes(SENTENCE * 60)
    fields = {"train.epochs": None, "train.steps": 2, "mesh.data": 1, "eval.batch_size": 8}
    if name == "transformer_enwik8":  # takes no path
        fields |= {"data.name": "text", "data.path": tmp_path / "book.txt"}
    else:
        arg += f",path={tmp_path / 'book.txt'}"
    settings = load_config(
        f"{CONFIGS / name}.py:{arg}", [f"{key}={value}" for key, value in fields.items()]
    )
    program = Trainer.from_config(settings)
    state, report = program.dispatch(program.init(), list(program.batches(0)))
    assert state["step"] == 2
    np.testing.assert_allclose(report["loss"][:2], math.log(256), atol=0.3)
    assert report["alphas"].shape == (2,)
    assert np.all(report["alphas"] != 0)

    # The optimizer's state can be told from the config that the workdir keeps.
    kept = ConfigDict(json.loads(settings.to_json()))
    make = make_language_model(kept.model)
    optimizer, _ = make_optimizer(kept.optim, 1, model_spec(make))
    shapes = jax.eval_shape(functools.partial(init_state, make, optimizer), jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(program.shapes)
    for a, b in zip(*map(jax.tree.leaves, (shapes, program.shapes)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


# ---- Mistakes


def images():
    split = ResidentSplit({"image": np.zeros((8, 4, 4, 1), np.uint8), "label": np.zeros(8, int)})
    return Dataset("random", split, split, (4, 4, 1), 10, (0.5,), (0.5,))


@pytest.mark.parametrize(
    ("name", "fields", "dataset", "sentence"),
    [
        (
            "transformer_small",
            {},
            text(length=9),
            "data.length=9 is more than model.max_len=8; lower it, or raise model.max_len",
        ),
        (
            "transformer_small",
            {"model.vocab_size": 122},
            text(),
            'the text "tiny" has the byte 122, which is not in model.vocab_size=122; set it to 256',
        ),
        ("transformer_small", {}, images(), "model.name=transformer reads text, not images"),
        ("mlp", {}, text(), "model.name=mlp reads images, not text; set it to transformer"),
        ("transformer_small", {"model.name": "transfomer"}, text(), 'did you mean "transformer"'),
        ("transformer_small", {"model.dtype": "bfloat"}, text(), 'did you mean "bfloat16"'),
        ("transformer_small", {"model.heads": 3}, text(), "heads=3 does not divide width=8"),
        ("transformer_small", {"model.positions": "none"}, text(), 'unknown positions "none"'),
        (
            "transformer_small",
            {"train.batch_size": 8, "train.accumulate": 3},
            text(),
            "train.accumulate=3 does not divide train.batch_size=8",
        ),
    ],
)
def test_mistakes_are_user_errors(name, fields, dataset, sentence):
    settings = (
        load_config(f"{CONFIGS / 'mlp.py'}:smoke", ["train.batch_size=8", "mesh.data=1"])
        if name == "mlp"
        else config(**fields)
    )
    with pytest.raises(UserError, match=sentence):
        Trainer(settings, dataset)


def test_the_largest_byte_of_a_text_is_in_a_vocabulary_of_one_more():
    assert Trainer(config(**{"model.vocab_size": 123}), text()).spec.parameter_count > 0
