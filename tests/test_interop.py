"""The modules in other people's code: Flax's tools, Linen, optimizers, 64 bits, meshes."""

import copy
import pickle
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rezero_jax import (
    MLP,
    AdaLNZero,
    Alpha,
    Decoder,
    Encoder,
    ReZero,
    Stack,
    Transformer,
    decay_mask,
    muon_dimensions,
    parameter_labels,
)
from rezero_jax.analysis.propagation import propagate
from rezero_jax.analysis.singular_values import mean_squared_singular_value
from rezero_jax.errors import UserError
from rezero_jax.residual import RULES
from rezero_jax.training import loop
from tests.families import FAMILIES, assert_trees_close, drawn, normal
from tests.faults.compare import differences


def block(rngs):
    return ReZero(nnx.Linear(8, 8, rngs=rngs))


def make(name, rngs):
    """A tiny module."""
    match name:
        case "stack":
            return Stack(block, 3, rngs=rngs)
        case "encoder":
            return Encoder(8, depth=2, heads=2, scan=False, rngs=rngs)
        case "decoder":
            return Decoder(8, depth=2, heads=2, final_norm=True, rngs=rngs)
        case "adaln":
            return AdaLNZero(nnx.Linear(8, 8, rngs=rngs), 8, 3, rngs=rngs)
    return FAMILIES[name].make(rngs=rngs)


def inputs_of(name):
    x = normal((4, 5, 8))
    others = {"decoder": (x, x[:, :3]), "adaln": (x, normal((4, 3)))}
    return (FAMILIES[name].example(4),) if name in FAMILIES else others.get(name, (x,))


def made(name):
    """A tiny module, nothing of which is compiled, and its inputs."""
    return drawn(partial(make, name)), inputs_of(name)


@nnx.jit
def call(model, *inputs):
    return model(*inputs)


MODULES = (*FAMILIES, "stack", "encoder", "decoder", "adaln")
WIDE = r"f64\[\d"  # an array; numbers of Python are f64[] until they meet one


def every_module(*fast):
    """A test of all modules, of which `fast` are in the fast suite."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in MODULES if name not in fast]
    return pytest.mark.parametrize("name", [*fast, *slow])


@every_module("mlp", "decoder", "adaln")
def test_flaxs_tools_take_every_module(name, capsys):
    model, inputs = made(name)
    model.eval()
    expected = call(model, *inputs)
    assert type(model).__name__ in nnx.tabulate(model, *inputs, depth=1)
    nnx.display(model)
    for twin in (
        copy.deepcopy(model),
        nnx.clone(model),
        pickle.loads(pickle.dumps(model)),
        nnx.merge(*nnx.split(model, Alpha, nnx.Param, ...)),
        made(name)[0],  # after nnx.tabulate, constructors work
    ):
        twin.eval()
        np.testing.assert_array_equal(call(twin, *inputs), expected)
    assert nnx.graphdef(made(name)[0]) == nnx.graphdef(made(name)[0])


def test_a_usual_linen_loop_trains_the_gates():
    model = nnx.bridge.to_linen(MLP, 8, 6, 3, 8, residual="mhc", metadata_fn=None)
    gated = nnx.bridge.to_linen(Stack, block, 3, metadata_fn=None)
    for linen in (model, gated):
        variables = jax.jit(linen.init)(jax.random.key(0), normal((2, 8)))
        assert not variables.keys() & {"Alpha", "StreamWeight"}
    params = variables["params"]

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.square(gated.apply({"params": params}, normal((2, 8))) - 1).mean()

    before, grads = loss(params)
    trained = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), params, grads)
    assert (trained["blocks"]["alpha"] != 0).all()
    assert loss(trained)[0] < before


class Own(nnx.Module):
    """Somebody's model with modules of this package in several places."""

    def __init__(self, rngs, scan=True):
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs)
        self.embedding = nnx.Embed(5, 8, rngs=rngs)
        self.inner = nnx.Dict(encoder=Encoder(8, depth=2, heads=2, scan=scan, rngs=rngs))
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.nested = Stack(lambda rngs: Stack(block, 2, scan=scan, rngs=rngs), 3, rngs=rngs)
        self.streams = MLP(8, 6, 2, 8, "hyper_connections", scan=scan, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.attention(x, decode=False))
        return self.streams(self.nested(self.inner["encoder"](x)))


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_only_matrices_decay_and_muon_takes_the_layers_matrices(scan):
    model = nnx.eval_shape(lambda: Own(nnx.Rngs(0), scan))
    labels, decays, dimensions = (
        dict(nnx.to_flat_state(f(model))) for f in (parameter_labels, decay_mask, muon_dimensions)
    )
    gates = {"alpha", "mix", "spread", "mix_scale", "spread_scale"}
    for path, kind in labels.items():
        is_vector = path[-1].endswith("bias") or path[-1] == "scale"
        expected = "gate" if path[-1] in gates else "vector" if is_vector else "matrix"
        assert (kind, decays[path]) == (expected, expected == "matrix"), path
    chosen = {path for path in labels if dimensions.get(path) is not None}
    assert all(labels[path] == "matrix" for path in chosen)
    names = {(path[0], path[-1]) for path in chosen}
    assert {("nested", "kernel"), ("streams", "kernel"), ("inner", "qkv")} <= names
    assert ("attention", "kernel") not in names  # not of the layers

    @nnx.eval_shape
    def updated():
        model = Own(nnx.Rngs(0), scan)
        params = nnx.state(model, nnx.Param)
        for tx in (
            optax.adamw(1.0, mask=decay_mask(model)),
            optax.contrib.muon(0.1, muon_weight_dimension_numbers=muon_dimensions(model)),
        ):
            nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, params)
        arrays = nnx.to_pure_dict(params)  # a nested dict
        groups = dict.fromkeys(("gate", "matrix", "vector"), optax.sgd(0.1))
        tx = optax.partition(groups, nnx.to_pure_dict(parameter_labels(model)))
        tx.update(arrays, tx.init(arrays), arrays)
        return model

    assert nnx.graphdef(updated) == nnx.graphdef(model)
    with pytest.raises(UserError, match="give the model"):
        decay_mask(nnx.state(model, nnx.Param))


@every_module("mlp", "resnet", "transformer", "adaln")
def test_no_module_computes_in_64_bits_unless_its_input_has_them(name):
    with jax.enable_x64(True):

        def loss(model, *inputs):
            return jnp.square(model(*inputs)).sum()

        def gradient(*inputs):
            return jax.grad(loss)(make(name, nnx.Rngs(0)), *inputs)

        text = str(jax.make_jaxpr(gradient)(*inputs_of(name)))
    assert not re.search(WIDE, text)


def test_no_rule_computes_in_64_bits():
    with jax.enable_x64(True):
        for rule in sorted(RULES.keys() - {"sub_norm"}):
            make = partial(MLP, 4, 6, 2, 3, rule)
            jaxpr = jax.make_jaxpr(lambda x, make=make: make(rngs=nnx.Rngs(0))(x))(normal((2, 4)))
            assert not re.search(WIDE, str(jaxpr)), rule


@pytest.mark.slow
def test_generation_and_analysis_are_the_same_where_64_bits_are_on():
    with jax.enable_x64(True):
        model = FAMILIES["transformer"].make(rngs=nnx.Rngs(0))
        with_64 = model.generate([[1, 2]], 3, top_p=0.9, rngs=nnx.Rngs(0))
    without = model.generate([[1, 2]], 3, top_p=0.9, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(with_64, without)
    assert with_64.dtype == jnp.int32
    model, x = made("mlp")
    measure = partial(mean_squared_singular_value, model, *x, probes=2, key=jax.random.key(0))
    with jax.enable_x64(True):
        wide = propagate(model, *x), measure().mean
    assert_trees_close(wide, (propagate(model, *x), measure().mean), rtol=1e-6)


@pytest.mark.parametrize(
    "family",
    ["mlp", *(pytest.param(f, marks=pytest.mark.slow) for f in ("transformer", "resnet", "vit"))],
)
def test_64_bits_change_no_bit_of_a_run_that_began_without_them(family, trained, copy_of):
    folder = copy_of(family, 4)
    with jax.enable_x64(True):
        loop.train(FAMILIES[family].load_config(), folder)
    assert differences(folder, trained(family)) == []


@pytest.mark.devices(4)
@every_module("mlp", "transformer", "adaln")
def test_explicit_meshes_work_or_are_refused(name):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        inputs = inputs_of(name)
        rows = NamedSharding(mesh, PartitionSpec("data"))
        sharded = [jax.device_put(one, rows) for one in inputs]
        if name in ("resnet", "transformer", "vit"):
            with pytest.raises(UserError, match="explicit mesh axes"):
                nnx.eval_shape(lambda: make(name, nnx.Rngs(0))(*sharded))
            return
        model = make(name, nnx.Rngs(0))
        outputs = call(model, *sharded)
    model = jax.device_get(model)
    np.testing.assert_allclose(outputs, call(model, *inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_an_empty_batch_gives_an_empty_output(name):
    model, inputs = made(name)
    empty = [one[:0] for one in inputs]
    if name == "resnet":
        with pytest.raises(UserError, match="no statistics"):
            call(model, *empty)
        model.eval()
    assert call(model, *empty).shape[0] == 0


def test_scalars_of_numpy_and_jax_are_sizes(unchecked):
    text = jnp.zeros((1, 4), jnp.int32)
    for integer in (np.int64, jnp.int32, np.uint8):
        sizes = [integer(n) for n in (11, 8, 2, 2, 6)]
        make = partial(Transformer, *sizes, kv_heads=integer(1), dropout=np.float32(0))
        model = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
        assert jax.eval_shape(lambda m, t: m(t), model, text).shape == (1, 4, 11)
        make = partial(FAMILIES["resnet"].make, depth=integer(8))
        assert nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0))).in_channels == 2
        make = partial(Stack, block, integer(3), scan=False)
        assert len(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))) == 3
    for depth in (2.0, "3", jnp.float32(3)):
        with pytest.raises(UserError, match="whole number"):
            MLP(4, 8, depth, 3, rngs=nnx.Rngs(0))
