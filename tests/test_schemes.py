"""Other rules in whole networks: parity with their reference code, initial weights, optimizers."""

from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from rezero_jax import MLP, Transformer
from rezero_jax.config import base_config
from rezero_jax.models.transformer.layer import DecoderLayer, Encoder, EncoderLayer
from rezero_jax.residual import RULES, Place
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import model_spec
from tests.families import stored, under

TOKENS = jnp.arange(12).reshape(2, 6) % 11


@pytest.mark.parametrize(
    ("case", "scan"),
    [
        ("deep_norm", True),
        ("sub_norm", False),
        ("layerscale", True),
    ],
)
def test_same_outputs_and_gradients_as_the_reference_code(case, scan):
    """torchscale's DeepNorm and Sub-LN, timm's LayerScale; two layers, unrolled and scanned."""
    arrays = under(f"{case}/", stored("schemes"))
    options = {"feedforward": 12, "residual": case, "activation": "gelu", "scan": scan}
    model = nnx.eval_shape(lambda: Encoder(8, 2, 2, **options, rngs=nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(params))

    def find(kind, path):
        """The reference's array for a parameter, of its layer where the stack is unrolled."""
        names = list(path[path.index("blocks") + 1 :])
        index = () if scan else (names.pop(0),)
        return arrays[f"{kind}/{'/'.join(map(str, names))}"][index]

    given = {path: jnp.asarray(find("params", path)) for path in flat}
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, flat)

    def loss(flat, x):
        nnx.replace_by_pure_dict(params, traverse_util.unflatten_dict(flat))
        out = nnx.merge(graphdef, params, rest)(x)
        return jnp.sum(out * arrays["cotangent"]), out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, grad_x), out = grad(given, jnp.asarray(arrays["x"]))
    compared = {"out": (out, arrays["out"]), "x": (grad_x, arrays["grad_x"])}
    compared |= {path: (value, find("grads", path)) for path, value in grads.items()}
    for name, (ours, theirs) in compared.items():
        scale = np.abs(theirs).max() + 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5 * scale, err_msg=str(name))


@pytest.mark.parametrize("case", ["deep_norm", "sub_norm"])
@pytest.mark.parametrize("make", [EncoderLayer, DecoderLayer])
def test_initial_weights_are_scaled_as_by_torchscale(case, make, monkeypatch):
    prefix = f"init/{case}/" + ("decoder/" if make is DecoderLayer else "")
    gains = under(prefix, stored("schemes"))
    scaled = make(8, 2, residual=case, place=Place(1, 3), rngs=nnx.Rngs(0))
    monkeypatch.setattr(RULES[case], "branch_gain", classmethod(lambda cls, place: 1.0))
    plain = make(8, 2, residual=case, place=Place(1, 3), rngs=nnx.Rngs(0))
    pairs = [("ffn.fc1", "feedforward.up.kernel"), ("ffn.fc2", "feedforward.down.kernel")]
    for theirs, ours in (("self_attn", "attention"), ("encoder_attn", "cross_attention")):
        if hasattr(plain, ours):
            pairs += [(f"{theirs}.{part}_proj", f"{ours}.qkv") for part in "qkv"]
            pairs.append((f"{theirs}.out_proj", f"{ours}.out.kernel"))
    for theirs, ours in pairs:
        ratio = attrgetter(ours)(scaled)[...] / attrgetter(ours)(plain)[...]
        if ours.endswith("qkv"):
            ratio = ratio[:, :, "qkv".index(theirs.split(".")[1][0])]
        np.testing.assert_allclose(ratio, gains[f"{theirs}.weight"], rtol=1e-5)
    for linear in ("up", "down"):
        biases = [getattr(layer.feedforward, linear).bias[...] for layer in (scaled, plain)]
        np.testing.assert_array_equal(*biases)


def test_rezero_norm_has_one_gate_and_a_norm_for_each_sublayer():
    layer = EncoderLayer(8, 2, residual="rezero_norm", rngs=nnx.Rngs(0))
    first, second = layer.rules
    assert first.alpha is second.alpha
    assert first.norm is not second.norm
    each = EncoderLayer(8, 2, residual="rezero_norm", alpha_per="sublayer", rngs=nnx.Rngs(0))
    assert each.rules[0].alpha is not each.rules[1].alpha


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["x0_scalars", "hyper_connections", "mhc"])
def test_decoding_gives_the_logits_of_the_whole_text(rule):
    model = Transformer(11, 8, 3, 2, 6, rule, rngs=nnx.Rngs(0))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    decoded = model.logits(model.decode(TOKENS, model.init_cache(2), positions)[0])
    np.testing.assert_allclose(decoded, model(TOKENS), rtol=1e-4, atol=1e-5)


def test_x0_scalars_mix_the_first_trunk_into_each_layer():
    """block(lambda x + mu x0), by the layers of a pre-norm net with the same weights."""
    model = MLP(6, 8, 3, 4, "x0_scalars", rngs=nnx.Rngs(0))
    start = model.trunk.blocks.rule
    np.testing.assert_allclose(start.trunk_scale[...], [1.15, 1.10, 1.05], rtol=1e-6)
    np.testing.assert_allclose(start.x0_scale[...], [0.20, 0.125, 0.05], rtol=1e-6)
    generator = np.random.default_rng(0)
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaf.set_value(jnp.asarray(generator.uniform(-0.5, 0.5, leaf.shape), leaf.dtype))
    x = jax.random.normal(jax.random.key(0), (5, 6))
    trunk = x0 = np.asarray(nnx.relu(model.stem(x)), np.float64)
    for block in model.trunk.layers():
        rule, linear = block.rule, block.linear
        u = float(rule.trunk_scale[...]) * trunk + float(rule.x0_scale[...]) * x0
        centred = u - u.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        normed = normed * np.asarray(rule.norm.scale[...]) + np.asarray(rule.norm.bias[...])
        branch = normed @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
        trunk = u + np.maximum(branch, 0)
    np.testing.assert_allclose(model(x), model.head(jnp.asarray(trunk)), rtol=1e-4, atol=1e-5)


# ---- Optimizers


def updated(rule, grads_of, *, depth=3, scan=True, **options):
    """The spec of an MLP, and the change that one update makes to each parameter, by path."""
    spec = model_spec(lambda rngs: MLP(6, 8, depth, 4, rule, scan=scan, rngs=rngs))
    settings = base_config().optim
    settings.update({"name": "adamw", "learning_rate": 0.1} | options)
    optimizer, _ = make_optimizer(settings, 10, spec)
    params = jax.tree.map(lambda shape: jnp.ones(shape.shape), spec.shapes)

    @jax.jit
    def update(params):
        return optimizer.update(jax.tree.map(grads_of, params), optimizer.init(params), params)[0]

    changes = update(params)
    return spec, {"/".join(map(str, k)): v for k, v in traverse_util.flatten_dict(changes).items()}


def test_numbers_that_mix_streams_have_no_decay_and_lambda_learns_slowly():
    spec, changes = updated("x0_scalars", jnp.zeros_like, weight_decay=0.1)
    for path, change in changes.items():
        expected = 0.0 if spec.parameters[path].kind == "gate" else -0.1 * 0.1
        np.testing.assert_allclose(change, expected, rtol=1e-5, err_msg=path)
    _, changes = updated("x0_scalars", jnp.ones_like)
    for path, change in changes.items():
        expected = -0.001 if path.endswith("trunk_scale") else -0.1
        np.testing.assert_allclose(change, expected, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_completep_divides_adams_epsilon_of_the_layers(scan):
    """A gradient of the size of epsilon shows it: -rate g / (g + epsilon / m), m = 8 / 2."""
    size = 1e-8
    _, changes = updated("completep", lambda leaf: jnp.full_like(leaf, size), depth=8, scan=scan)
    assert any("trunk" in path for path in changes)
    for path, change in changes.items():
        epsilon = 1e-8 / 4 if path.startswith("trunk") else 1e-8
        expected = -0.1 * size / (size + epsilon)
        np.testing.assert_allclose(change, expected, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    ("optimizer", "scan"),
    [
        ("adamw", True),
        ("sgd", True),
        *(
            pytest.param(name, scan, marks=pytest.mark.slow)
            for name in ("adagrad", "lamb", "muon")
            for scan in (True, False)
        ),
    ],
)
def test_depth_mup_divides_the_rate_of_the_layers_except_under_sgd(optimizer, scan):
    """By 2 where L / L0 is 8 / 2, against the same update under pre_norm."""
    changes = {
        rule: updated(rule, jnp.ones_like, depth=8, scan=scan, name=optimizer)[1]
        for rule in ("pre_norm", "depth_mup")
    }
    for path, change in changes["depth_mup"].items():
        divisor = 2 if path.startswith("trunk") and optimizer != "sgd" else 1
        expected = changes["pre_norm"][path] / divisor
        np.testing.assert_allclose(change, expected, rtol=1e-5, err_msg=path)
