"""Muon: the orthogonalised momentum in NumPy, matrix by matrix; AdamW for the rest."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rezero_jax import MLP, ResNet, Transformer, ViT
from rezero_jax.config import base_config, optim_group
from rezero_jax.formatting import path_text
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import model_spec

TRANSFORMER = partial(Transformer, 11, 8, 3, 4, 6, positions="learned", kv_heads=2)
MODELS = {
    "mlp": partial(MLP, 4, 6, 3, 2),
    "transformer": TRANSFORMER,
    "vit": partial(ViT, 4, 2, 8, 3, 2, 5, feedforward=12),
    "cifar": partial(ResNet.cifar, 14, width=2),
}
MUON = {"name": "muon", "learning_rate": 0.01, "weight_decay": 0.1}


def spec_of(make, **options):
    return model_spec(lambda rngs: make(**options, rngs=rngs))


def settings(**fields):
    config = base_config().optim
    config.update(fields)
    return config


def random_tree(spec, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), spec.shapes)


def run(spec, config, params, gradients):
    """The parameters, path -> array, after updates by these gradients."""
    optimizer, _ = make_optimizer(config, 10, spec)

    @jax.jit
    def update(params, state, gradient):
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = update(params, state, gradient)
    return flat(params)


def flat(tree):
    return {path_text(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def orthogonal(matrix):
    """Five of Muon's Newton-Schulz steps; singular values end near 1."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon(params, gradients):
    """A matrix after updates by these gradients: Nesterov momentum 0.95, bias corrected."""
    momentum = 0.0
    for t, gradient in enumerate(gradients, 1):
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = 0.95 * momentum / (1 - 0.95 ** (t + 1)) + 0.05 * gradient / (1 - 0.95**t)
        step = 0.2 * np.sqrt(max(params.shape)) * orthogonal(ahead)
        params = params - 0.01 * (step + 0.1 * params)
    return params


def matrices(name, leaf):
    """The views of a stacked or single parameter that Muon takes for matrices."""
    if name.endswith("qkv"):  # (..., width, kv_heads, queries + 2, size)
        for layer in leaf.reshape(-1, *leaf.shape[-4:]):
            for slot in range(leaf.shape[-2]):
                yield layer[:, :, slot].reshape(leaf.shape[-4], -1)
    elif leaf.shape[-4:-2] in ((3, 3), (1, 1)):  # (..., rows, columns, in, out)
        yield from leaf.reshape(-1, 9 * leaf.shape[-2], leaf.shape[-1])
    else:
        yield from leaf.reshape(-1, *leaf.shape[-2:])


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "vit" else []) for name in MODELS],
)
def test_each_matrix_of_each_layer_moves_by_the_equations_and_the_rest_by_adamw(family):
    spec = spec_of(MODELS[family])
    before, gradients = random_tree(spec, 0), [random_tree(spec, i) for i in (1, 2)]
    after = run(spec, settings(**MUON), before, gradients)
    adamw = run(spec, settings(**MUON | {"name": "adamw"}), before, gradients)
    before, gradients = flat(before), [flat(gradient) for gradient in gradients]
    hidden = [
        name
        for name in before
        if name.startswith(("trunk/", "stages/")) and name.endswith(("kernel", "/qkv"))
    ]
    assert {p for p, info in spec.parameters.items() if info.matrix_axes} == set(hidden)
    for name, value in after.items():
        if name not in hidden:
            np.testing.assert_array_equal(value, adamw[name], err_msg=name)
            continue
        parts = zip(
            matrices(name, before[name]),
            zip(*(matrices(name, gradient[name]) for gradient in gradients), strict=True),
            matrices(name, value),
            strict=True,
        )
        for start, steps, end in parts:
            expected = muon(np.float64(start), np.float64(steps))
            np.testing.assert_allclose(end, expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("family", ["mlp", pytest.param("transformer", marks=pytest.mark.slow)])
def test_a_scanned_network_moves_as_its_unrolled_twin(family):
    scanned, unrolled = (spec_of(MODELS[family], scan=scan) for scan in (True, False))
    trees = [random_tree(scanned, seed) for seed in range(3)]
    one = run(scanned, settings(**MUON), trees[0], trees[1:])

    def in_a_list(tree):
        found = {}
        for path, leaf in flat(tree).items():
            before, stacked, after = path.partition("blocks/")
            for i in range(3 if stacked else 1):
                found[f"{before}blocks/{i}/{after}" if stacked else path] = (
                    leaf[i] if stacked else leaf
                )
        paths = [path_text(path) for path, _ in jax.tree.leaves_with_path(unrolled.shapes)]
        return jax.tree.unflatten(
            jax.tree.structure(unrolled.shapes), [jnp.asarray(found[path]) for path in paths]
        )

    first, *rest = map(in_a_list, trees)
    for path, value in run(unrolled, settings(**MUON), first, rest).items():
        before, stacked, after = path.partition("blocks/")
        index, _, tail = after.partition("/")
        expected = one[f"{before}blocks/{tail}"][int(index)] if stacked else one[path]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_groups_have_rates_of_their_own_and_gates_no_decay():
    spec = spec_of(MODELS["mlp"], scan=False)
    config = settings(**MUON)
    config.alpha.learning_rate = 0.0
    config.groups.head = optim_group(path="head", learning_rate=0.0)
    params, gradient = random_tree(spec, 0), random_tree(spec, 1)
    after = run(spec, config, params, [gradient])
    for name, before in flat(params).items():
        kept = "head" in name or "alpha" in name
        assert np.array_equal(after[name], before) is kept, name


def test_the_updates_singular_values_are_near_one():
    spec = spec_of(MODELS["mlp"])
    params, gradient = random_tree(spec, 0), random_tree(spec, 1)
    after = run(spec, settings(**MUON | {"weight_decay": 0.0}), params, [gradient])
    name = "trunk/blocks/linear/kernel"
    values = np.linalg.svd(flat(params)[name] - after[name], compute_uv=False)
    assert values.shape == (3, 6)
    assert (values / (0.01 * 0.2 * np.sqrt(6))).min() > 0.5
    assert (values / (0.01 * 0.2 * np.sqrt(6))).max() < 1.3


@pytest.mark.slow
def test_a_small_network_learns():
    model = nnx.jit(lambda: MLP(4, 16, 4, 1, rngs=nnx.Rngs(0)))()
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    optimizer, _ = make_optimizer(settings(**MUON), 60, spec_of(partial(MLP, 4, 16, 4, 1)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)
    y = jnp.sin(x.sum(axis=1, keepdims=True))

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params)(x) - y).mean()

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        changes, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, changes), state), value

    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, length=60))(
        (params, optimizer.init(params))
    )
    assert losses[-1] < 0.2 * losses[0]
