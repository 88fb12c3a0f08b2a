"""Residual networks on images: parity with PyTorch, every rule, parameter counts, mistakes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from rezero_jax import ResNet
from rezero_jax.errors import UserError
from rezero_jax.training.state import model_spec
from tests.families import assert_trees_close, drawn, normal, stored, under

CIFAR = partial(ResNet.cifar, 14, num_classes=5, width=2, scan=True)
PREACT = partial(ResNet.preact, 18, num_classes=5, width=1, scan=True)
PREACT50 = partial(ResNet.preact, 50, num_classes=5, width=1, scan=True)
FAST = {
    "cifar_zero_gamma": partial(CIFAR, residual="zero_gamma"),
    "cifar_rezero": partial(CIFAR, residual="rezero"),
    "cifar_fixup": partial(CIFAR, residual="fixup"),
    "preact_rezero": partial(PREACT, residual="rezero"),
}
SLOW = {
    "preact_fixup": partial(PREACT, residual="fixup"),
    "cifar_rezero_subsample": partial(CIFAR, residual="rezero", variant="notebook"),
    "cifar_gated": partial(CIFAR, residual="gated"),
    "cifar_residual": partial(CIFAR, residual="residual"),
    "cifar_skipinit": partial(CIFAR, residual="skipinit"),
    "cifar_rezero_no_norm": partial(CIFAR, residual="rezero", batch_norm=False),
    "preact_residual": partial(PREACT, residual="residual"),
    "preact_gated": partial(PREACT, residual="gated"),
    "preact_skipinit": partial(PREACT, residual="skipinit"),
    "preact_rezero_no_norm": partial(PREACT, residual="rezero", batch_norm=False),
    "preact_rezero_imagenet": partial(PREACT, residual="rezero", stem="imagenet"),
    "preact50_rezero": partial(PREACT50, residual="rezero"),
    "preact50_fixup": partial(PREACT50, residual="fixup"),
}
CASES = FAST | SLOW
IMAGES = normal((4, 16, 16, 3), seed=7)


@jax.jit
def forward(model, x):
    return model(x)


def part(arrays, prefix):
    """The arrays under a prefix, nested by the rest of their paths."""
    return traverse_util.unflatten_dict(
        {
            tuple(int(p) if p.isdigit() else p for p in path.split("/")): jnp.asarray(value)
            for path, value in under(prefix, arrays).items()
        }
    )


@pytest.mark.guarantee("PyTorch parity")
@pytest.mark.parametrize(
    "case",
    [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_same_as_pytorch_in_training_and_evaluation(case):
    arrays = under(f"{case}/", stored("resnet"))
    spec = model_spec(lambda rngs: CASES[case](rngs=rngs))
    params, stats = part(arrays, "params/"), part(arrays, "stats/")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, spec.shapes)

    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4), optax.trace(0.9), optax.scale_by_learning_rate(0.05)
    )

    @jax.jit
    def step(params, stats, opt_state, images, labels):
        def loss(params):
            model = spec.model(params, stats)
            logits = model(images)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, (logits, loss, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        grads, (logits, loss, new) = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new, opt_state, grads, logits, loss

    shapes = jax.eval_shape(optimizer.init, params)
    opt_state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    for i, batch in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        params, stats, opt_state, grads, logits, loss = step(params, stats, opt_state, *batch)
        if i == 0:
            np.testing.assert_allclose(logits, arrays["logits"], rtol=2e-5, atol=5e-6)
            np.testing.assert_allclose(loss, arrays["loss"], rtol=2e-5)
            assert_trees_close(grads, part(arrays, "grads/"), rtol=1e-4, atol=5e-6)
    assert_trees_close(params, part(arrays, "params_after/"), rtol=1e-4, atol=1e-5)
    assert_trees_close(stats, part(arrays, "stats_after/"), rtol=1e-4, atol=1e-5)
    model = spec.model(params, stats)
    model.eval()
    logits = forward(model, arrays["images"][0])
    np.testing.assert_allclose(logits, arrays["eval_logits"], rtol=1e-4, atol=1e-5)


def test_parameter_counts():
    cifar, preact = partial(ResNet.cifar, scan=True), partial(ResNet.preact, scan=True)
    for make, count in (
        (partial(cifar, 20, "residual"), 269_818),
        (partial(cifar, 20, "rezero"), 269_818 + 9),
        (partial(cifar, 20, "rezero_channel"), 269_818 + 3 * (16 + 32 + 64)),
        (partial(cifar, 20, "fixup"), 268_393),
        (partial(cifar, 20, "skipinit"), 269_043),
        (partial(cifar, 20, "rezero", batch_norm=False), 269_043),
        (partial(cifar, 110, "rezero"), 1_728_112),
        (partial(preact, 18, "rezero"), 11_171_154),
        (partial(preact, 50, "residual"), 23_509_066),
        (partial(preact, 50, "fixup"), 23_467_851),
        # The authors' notebook prints 0.270M, 0.853M and 1.728M.
        (partial(cifar, 20, "residual", variant="notebook"), 269_722),
        (partial(cifar, 56, "residual", variant="notebook"), 853_018),
        (partial(cifar, 110, "residual", variant="notebook"), 1_727_962),
    ):
        spec = model_spec(lambda rngs, make=make: make(rngs=rngs))
        assert spec.parameter_count == count, make


def without_branches(model, x):
    """The network of the shortcuts alone."""
    x = model.stem(x)
    for stage in model.stages:
        if stage.entry is not None:
            u = nnx.relu(stage.entry.norm1(x)) if hasattr(stage.entry, "conv3") else x
            x = stage.entry.shortcut(u)
    return model.head(x.mean((1, 2)))


@pytest.mark.parametrize("rule", ["rezero", "skipinit", "rezero_channel", "preact"])
def test_closed_gates_leave_the_shortcuts_alone_to_the_bit(rule):
    cifar = partial(ResNet.cifar, 14, rule, batch_norm=rule != "rezero")
    make = partial(ResNet.preact, 18) if rule == "preact" else cifar
    model = drawn(partial(make, width=4), alpha=0.0)
    model.eval()
    np.testing.assert_array_equal(forward(model, IMAGES), jax.jit(without_branches)(model, IMAGES))


@pytest.mark.slow
def test_initial_distributions():
    for options, find, fan, expected, is_normal in (
        ({"residual": "rezero"}, lambda stage: stage.rest.blocks[0].conv1, 9 * 64, 2.0, True),
        ({"residual": "residual"}, lambda stage: stage.entry.conv1, 9 * 64, 2.0, True),  # fan out
        ({"variant": "notebook"}, lambda stage: stage.entry.conv1, 9 * 32, 2.0, True),  # fan in
        ({"residual": "gated"}, lambda stage: stage.rest.blocks[0].conv2, 9 * 64, 1 / 3, False),
        # Over 15 blocks.
        ({"residual": "fixup"}, lambda stage: stage.rest.blocks[0].conv1, 9 * 64, 2 / 15, True),
        ({"residual": "skipinit"}, lambda stage: stage.rest.blocks[0].conv2, 9 * 64, 2.0, True),
    ):
        model = ResNet.cifar(32, **options, rngs=nnx.Rngs(0))
        values = np.asarray(find(model.stages[2]).kernel[...])
        np.testing.assert_allclose(values.var() * fan, expected, rtol=0.05)
        excess = (values**4).mean() / values.var() ** 2 - 3
        assert abs(excess - (0.0 if is_normal else -1.2)) < 0.15  # -1.2: uniform
    fixup = ResNet.cifar(14, "fixup", rngs=nnx.Rngs(0))
    for zero in (fixup.stages[1].entry.conv2.kernel, fixup.head.kernel, fixup.head.bias):
        assert not np.any(zero[...])
    assert float(fixup.stages[0].rest.blocks[0].scale[...]) == 1.0
    zero_gamma = ResNet.cifar(14, "zero_gamma", rngs=nnx.Rngs(0)).stages[1].entry
    assert not np.any(zero_gamma.norm2.scale[...])
    assert np.all(zero_gamma.norm1.scale[...] == 1)
    # Three convolutions a block: blocks^(-1/4) on the deviation.
    bottleneck = ResNet.preact(50, "fixup", width=16, rngs=nnx.Rngs(0)).stages[3].entry
    np.testing.assert_allclose(bottleneck.conv2.kernel[...].var() * 9 * 128, 2 / 4, rtol=0.05)
    assert not np.any(bottleneck.conv3.kernel[...])
    preact = ResNet.preact(18, width=16, rngs=nnx.Rngs(0)).stages[3].entry.conv2.kernel[...]
    np.testing.assert_allclose(preact.var() * 9 * 128, 1 / 3, rtol=0.05)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_logits():
    make = partial(ResNet.cifar, 8, width=4, dtype=jnp.bfloat16)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
    assert jax.eval_shape(forward, model, IMAGES).dtype == jnp.float32
    trunk = jax.eval_shape(lambda model, x: model.stages[0](model.stem(x)), model, IMAGES)
    assert trunk.dtype == jnp.float32
    branch = jax.eval_shape(lambda model, x: model.stages[1].entry.branch(x), model, trunk)
    assert branch.dtype == jnp.bfloat16


def test_mistakes_are_user_errors():
    cifar, preact = ResNet.cifar, ResNet.preact
    for make, sentence in (
        (partial(cifar, 21), "depth=21 is not 6n [+] 2; choose 20 or 26"),
        (partial(cifar, 2), "choose 8 or 14"),
        (partial(preact, 20), 'unknown depth "20".*18, 34, 50'),
        (partial(cifar, 20, "rezerro"), 'did you mean "rezero"'),
        (partial(cifar, 20, variant="notebok"), 'did you mean "notebook"'),
        (partial(preact, 18, stem="image"), 'did you mean "imagenet"'),
        (partial(preact, 18, "zero_gamma"), "zero_gamma needs a last BatchNorm"),
        (partial(cifar, 20, "zero_gamma", batch_norm=False), "batch_norm=True"),
        *(
            (partial(cifar, **{size: 0}), f"{size} is 0")
            for size in ("num_classes", "width", "in_channels")
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            make(rngs=nnx.Rngs(0))
    model = nnx.eval_shape(lambda: cifar(8, width=2, rngs=nnx.Rngs(0)))
    for shape, sentence in (
        ((1, 3, 8, 8), r"transpose\(0, 2, 3, 1\)"),
        ((1, 8, 8, 1), "not .1, 8, 8, 1."),
        ((8, 8, 3), "not .8, 8, 3."),
    ):
        with pytest.raises(UserError, match=sentence):
            model(jnp.ones(shape))
