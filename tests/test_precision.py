"""Computation in bfloat16: every rule of every family, and a trunk that keeps what is added."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from rezero_jax import MLP, ResNet, Transformer, ViT
from rezero_jax.models.resnet import config as resnet
from rezero_jax.residual import RULES, Alpha
from tests.families import drawn

TOKENS = jnp.arange(12).reshape(2, 6) % 11
IMAGES = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
FAMILIES = {  # how a network is made, and its input
    "mlp": (partial(MLP, 12, 8, 3, 5), IMAGES.reshape(8, 12)),
    "transformer": (partial(Transformer, 11, 8, 3, 2, 6, dropout=0.1), TOKENS),
    "vit": (partial(ViT, 4, 2, 8, 3, 2, 5), IMAGES),
    "cifar": (partial(ResNet.cifar, 14, width=2, scan=True), IMAGES),
    "preact": (partial(ResNet.preact, 18, width=2, scan=True), IMAGES),
}
FAST = [("mlp", "norm"), ("transformer", "rezero"), ("transformer", "mhc"), ("cifar", "rezero")]
SLOW = [("transformer", rule) for rule in RULES] + [("cifar", rule) for rule in resnet.RULES]
SLOW += [("vit", "rezero"), ("preact", "rezero")]


@pytest.mark.parametrize(
    ("family", "rule"),
    [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW if one not in FAST)],
)
def test_every_rule_trains_in_both_dtypes(family, rule):
    make, x = FAMILIES[family]

    def loss(params, graphdef, rest):
        random = {"rngs": nnx.Rngs(dropout=1)} if family == "transformer" else {}
        return jnp.square(nnx.merge(graphdef, params, nnx.as_pure(rest))(x, **random)).mean()

    for dtype in (jnp.float32, jnp.bfloat16):
        model = drawn(partial(make, residual=rule, dtype=dtype))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        grads = jax.eval_shape(
            lambda *args, g=graphdef: jax.grad(loss)(args[0], g, args[1]), params, rest
        )
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    model.eval()
    logits = jax.jit(lambda model: model(x))(model)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()


@pytest.mark.parametrize(
    "family",
    ["mlp", "transformer", *(pytest.param(f, marks=pytest.mark.slow) for f in ("vit", "cifar"))],
)
def test_a_trunk_keeps_what_small_gates_add_to_it(family):
    """A change of one part in 10,000 would be lost in eight bits."""
    make, x = FAMILIES[family]

    @jax.jit
    def outcome(model):
        return model.hidden(x) if family == "transformer" else model(x)

    def added(dtype):
        model = drawn(partial(make, dtype=dtype))
        model.eval()
        gates = [leaf for _, leaf in nnx.iter_graph(model) if isinstance(leaf, Alpha)]
        outcomes = []
        for alpha in (1e-4, 0.0):
            for gate in gates:
                gate[...] = jnp.full_like(gate[...], alpha)
            outcomes.append(outcome(model))
        return outcomes[0] - outcomes[1]

    exact, ours = added(jnp.float32), added(jnp.bfloat16)
    assert ours.dtype == jnp.float32
    assert jnp.linalg.norm(ours - exact) < 0.2 * jnp.linalg.norm(exact)  # or lost, and then 1


def test_decoding_keeps_it_too_and_caches_in_the_dtype_of_the_computation():
    make = partial(Transformer, 11, 8, 3, 2, 6, dtype=jnp.bfloat16)
    model, closed = drawn(make), drawn(make)
    for network, alpha in ((model, 1e-4), (closed, 0.0)):
        gates = network.trunk.layers.blocks.rules[0].alpha
        gates[...] = jnp.full_like(gates[...], alpha)

    @jax.jit
    def both(model, closed):
        positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
        hidden, cache = model.decode(TOKENS, model.init_cache(2), positions)
        start = closed.hidden(TOKENS)
        return hidden - start, model.hidden(TOKENS) - start, cache

    decoded, expected, cache = both(model, closed)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cache))
    assert jnp.linalg.norm(decoded - expected) < 0.02 * jnp.linalg.norm(expected)
