"""Which form attention takes on which device, and that the forms agree."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rezero_jax import Transformer, devices
from rezero_jax.models import dropout
from rezero_jax.models.dropout import Dropout
from rezero_jax.models.transformer.attention import attend
from rezero_jax.models.transformer.flash import flash, takes
from rezero_jax.models.transformer.layer import DecoderLayer
from rezero_jax.models.transformer.splash import splash
from rezero_jax.training.sharding import place_devices

H100, V100, MI300 = "NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-16GB", "AMD Instinct MI300X"
GPU_KINDS = {  # whether cuDNN's attention runs there
    H100: True,
    "NVIDIA A100-SXM4-40GB": True,
    "NVIDIA L4": True,
    "NVIDIA GeForce RTX 2080 Ti": False,
    "Tesla T4": False,
    V100: False,
    "Quadro RTX 8000": False,
    MI300: False,
}


@pytest.mark.parametrize(
    ("target", "dtype", "size", "length", "taken"),
    [
        (("gpu", H100), jnp.float16, 64, 4, True),
        (("gpu", H100), jnp.bfloat16, 8, 4, True),
        (("gpu", H100), jnp.bfloat16, 128, 4, True),
        (("gpu", H100), jnp.bfloat16, 136, 4, False),
        (("gpu", H100), jnp.bfloat16, 12, 4, False),
        (("gpu", H100), jnp.bfloat16, 64, 5, False),
        (("gpu", H100), jnp.float32, 64, 4, False),
        (("cpu", "cpu"), jnp.bfloat16, 64, 4, False),
        (("tpu", "TPU v5 lite"), jnp.bfloat16, 64, 4, False),
        *((("gpu", kind), jnp.bfloat16, 64, 4, taken) for kind, taken in GPU_KINDS.items()),
    ],
)
def test_cudnn_is_chosen_where_it_can(target, dtype, size, length, taken, monkeypatch):
    calls = recorded_calls(target, monkeypatch)
    q, k = jnp.zeros((1, length, 4, size), dtype), jnp.zeros((1, length, 2, size), dtype)
    jax.eval_shape(lambda: attend(q, k, k, is_causal=True))
    expected = {"mask": None, "is_causal": True, "implementation": "cudnn" if taken else None}
    assert calls == ([expected] if taken else [])  # else by blocks


@pytest.mark.devices(4)
@pytest.mark.parametrize("is_causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_flash_attention_drops_what_the_plain_form_drops(is_causal, monkeypatch):
    """Interpreted, with gradients, on one device and with batch and heads sharded."""
    monkeypatch.setattr(dropout, "target", lambda: devices.Target("gpu", H100))
    keys = jax.random.split(jax.random.key(0), 4)
    qkv, bias, g = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((2, 128, 2, 3, 16), (2, 3, 16), (2, 128, 2, 16)), strict=False)
    )
    seed = jax.random.key_data(nnx.Rngs(dropout=keys[3]).dropout())

    def plain(qkv, bias):
        q, k, v = jnp.moveaxis(qkv + bias[None, None], 3, 0)
        drop = partial(Dropout(0.2), rngs=nnx.Rngs(dropout=keys[3]))
        return attend(q, k, v, is_causal=is_causal, drop=drop, plain=True)

    def ours(qkv, bias):
        return flash(qkv, bias, seed, rate=0.2, is_causal=is_causal, interpret=True)

    def with_gradients(form, qkv, bias):
        out, pullback = jax.vjp(form, qkv, bias)
        return out, *pullback(g)

    expected = jax.jit(partial(with_gradients, plain))(qkv, bias)
    for shape in ((1, 1), (2, 2)):
        with jax.set_mesh(place_devices(jax.devices(), *shape)):
            found = jax.jit(partial(with_gradients, ours))(qkv, bias)
        for one, other in zip(found, expected, strict=True):
            # The sums of softmax and products differ in order.
            assert jnp.abs(one - other).max() < 2e-6 * jnp.abs(other).max()


@pytest.mark.parametrize(
    ("options", "length", "taken"),
    [
        ({}, 192, True),
        ({"positions": "learned"}, 64, True),
        ({"positions": "rotary"}, 192, True),
        ({"bias": False}, 192, True),
        ({"kv_heads": 1}, 192, False),
        ({"dtype": jnp.float32}, 192, False),
        ({"attention": "plain"}, 192, False),
        ({}, 96, False),
    ],
)
def test_on_a_gpu_dropout_of_attention_copies_no_queries_and_no_scores(
    options, length, taken, monkeypatch
):
    for module in (devices, dropout):
        monkeypatch.setattr(module, "target", lambda: devices.Target("gpu", H100))
    options = {"dropout": 0.2, "dtype": jnp.bfloat16} | options
    model = nnx.eval_shape(lambda: Transformer(256, 32, 1, 2, length, **options, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((2, length), jnp.uint8)

    def loss(model):
        return model.losses(tokens, tokens, rngs=nnx.Rngs(dropout=1)).mean()

    found = list(equations(jax.make_jaxpr(nnx.grad(loss))(model).jaxpr))
    names = [name for name, _ in found]
    assert ("pallas_call" in names) == taken
    if taken and options.get("positions") != "rotary":
        assert all(shape[-2:] != (length, length) for _, shapes in found for shape in shapes)
        moves = ("transpose", "slice", "squeeze", "concatenate", "pad")
        projections = (2, length, 2, 3, 16)
        assert not [name for name, shapes in found if name in moves and projections in shapes]


def test_flash_attention_with_large_heads_is_for_gpus_with_enough_shared_memory(monkeypatch):
    for kind, most in ((H100, 256), ("NVIDIA H200", 256), ("NVIDIA A100-SXM4-40GB", 128)):
        monkeypatch.setattr(devices, "target", lambda kind=kind: devices.Target("gpu", kind))
        assert [size for size in (8, 16, 128, 256) if takes(2, 64, 1, size)][-1] == most


def equations(jaxpr):
    """The primitive and the shapes of each equation outside of kernels."""
    for equation in jaxpr.eqns:
        values = (*equation.invars, *equation.outvars)
        yield equation.primitive.name, [getattr(v.aval, "shape", ()) for v in values]
        if equation.primitive.name != "pallas_call":
            for value in jax.tree.leaves(equation.params):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_cudnn_gets_masks_of_every_head_query_and_key(monkeypatch):
    """It takes no axes of size 1, as masks of padding have them."""
    calls = recorded_calls(("gpu", H100), monkeypatch)
    layer = DecoderLayer(16, 2, kv_heads=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, memory = jnp.zeros((3, 4, 16)), jnp.zeros((3, 6, 16))
    masks = {"key_mask": jnp.ones((3, 4), bool), "memory_key_mask": jnp.ones((3, 6), bool)}
    jax.eval_shape(lambda: layer(x, memory, is_causal=True, **masks))
    jax.eval_shape(lambda: layer(x, memory, jnp.ones((4, 4), bool)))
    assert [call["implementation"] for call in calls] == ["cudnn"] * 4
    shapes = [call["mask"] if call["mask"] is None else call["mask"].shape for call in calls]
    assert shapes == [(3, 2, 4, 4), (3, 2, 4, 6), (3, 2, 4, 4), None]
    assert [call["is_causal"] for call in calls] == [True, False, False, False]


def recorded_calls(target, monkeypatch):
    """The keywords with which jax.nn.dot_product_attention is called for a target."""
    calls = []

    def record(q, k, v, **options):
        calls.append(options)
        return q

    monkeypatch.setattr(devices, "target", lambda: devices.Target(*target))
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return calls


TPU = devices.Target("tpu", "TPU v5 lite")


@pytest.mark.parametrize(
    ("is_causal", "heads", "kv_heads", "queries", "keys", "size", "dtype"),
    [
        (True, 4, 2, 256, 256, 8, jnp.float32),
        (False, 4, 1, 128, 256, 8, jnp.bfloat16),
        # blocks of 128, as 512 does not divide it
        pytest.param(True, 1, 1, 640, 640, 8, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_splash_attention_equals_the_plain_form(
    is_causal, heads, kv_heads, queries, keys, size, dtype
):
    """Interpreted, with gradients."""
    q, k, v, g = (
        jax.random.normal(jax.random.key(seed), (2, length, count, size), dtype)
        for seed, (length, count) in enumerate(
            ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
        )
    )

    @jax.jit
    def with_gradients(q, k, v, g):
        forms = (
            partial(splash, is_causal=is_causal, interpret=True),
            partial(jax.nn.dot_product_attention, is_causal=is_causal),
        )
        results = [jax.vjp(form, q, k, v) for form in forms]
        return [(out, *pullback(g)) for out, pullback in results]

    for ours, expected in zip(*with_gradients(q, k, v, g), strict=True):
        assert ours.dtype == dtype
        error = jnp.abs((ours - expected).astype(jnp.float32)).max()
        assert error <= (1e-5 if dtype == jnp.float32 else 2.0**-6) * jnp.abs(expected).max()


@pytest.mark.slow
@pytest.mark.devices(8)
def test_splash_attention_stays_on_each_device():
    """Of the batch and of the heads, each computes what it has: nothing is gathered."""
    shape, axes = (2, 2, 2), ("spare", "data", "model")  # along `spare` work is repeated
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    q, k = (jax.random.normal(jax.random.key(n), (2, 128, n, 8)) for n in (4, 2))

    def loss(q, k):
        return jnp.sum(jnp.sin(splash(q, k, k, is_causal=True, interpret=True)))

    expected = jax.jit(jax.grad(loss, (0, 1)))(q, k)
    with jax.set_mesh(mesh):
        args = jax.device_put((q, k), place)
        program = jax.jit(jax.grad(loss, (0, 1)), out_shardings=place).lower(*args).compile()
        grads = program(*args)
    assert "all-gather" not in program.as_text()
    for ours, whole in zip(grads, expected, strict=True):
        assert jnp.abs(ours - whole).max() < 1e-5 * jnp.abs(whole).max()


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    ("length", "batch", "mask", "drop", "taken"),
    [
        (1024, 2, False, False, True),
        (1152, 2, False, False, True),
        (512, 2, False, False, False),  # too short to gain
        (1100, 2, False, False, False),  # no multiple of 128
        (1024, 3, False, False, False),  # does not divide among the devices
        (1024, 2, True, False, False),
        (1024, 2, False, True, False),
    ],
)
def test_splash_attention_is_chosen_on_tpus_where_it_can(
    length, batch, mask, drop, taken, monkeypatch
):
    monkeypatch.setattr(devices, "target", lambda: TPU)
    q = jax.ShapeDtypeStruct((batch, length, 2, 8), jnp.bfloat16)
    form = partial(
        attend,
        mask=jnp.ones((1, 1, length, length), bool) if mask else None,
        is_causal=True,
        drop=(lambda weights: weights) if drop else None,
    )
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(form)(q, q, q))
    assert ("pallas_call" in text) == ("shard_map" in text) == taken
