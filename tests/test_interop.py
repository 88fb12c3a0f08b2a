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
from tests.families import FAMILIES, assert_trees_close, normal
from tests.faults.compare import differences


def block(rngs):
    return ReZero(nnx.Linear(8, 8, rngs=rngs))


def made(name):
    """A tiny module and its inputs."""
    rngs, x = nnx.Rngs(0), normal((4, 5, 8))
    match name:
        case "stack":
            return Stack(block, 3, rngs=rngs), (x,)
        case "encoder":
            return Encoder(8, depth=2, heads=2, scan=False, rngs=rngs), (x,)
        case "decoder":
            return Decoder(8, depth=2, heads=2, final_norm=True, rngs=rngs), (x, x[:, :3])
        case "adaln":
            return AdaLNZero(nnx.Linear(8, 8, rngs=rngs), 8, 3, rngs=rngs), (x, normal((4, 3)))
    return FAMILIES[name].make(rngs=rngs), (FAMILIES[name].example(4),)


@nnx.jit
def call(model, *inputs):
    return model(*inputs)


MODULES = (*FAMILIES, "stack", "encoder", "decoder", "adaln")
WIDE = r"f64\[\d"  # an array; numbers of Python are f64[] until they meet one


@pytest.mark.parametrize("name", MODULES)
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


def test_a_view_of_a_network_changes_its_mode_alone():
    model, (x,) = made("resnet")
    view = nnx.view(model, use_running_average=True)
    assert (view.stem.norm.use_running_average, model.stem.norm.use_running_average) == (
        True,
        False,
    )
    view(x)
    np.testing.assert_array_equal(model.stem.norm.mean[...], 0)


def test_a_usual_linen_loop_trains_the_gates():
    model = nnx.bridge.to_linen(MLP, 8, 6, 3, 8, residual="mhc", metadata_fn=None)
    gated = nnx.bridge.to_linen(Stack, block, 3, metadata_fn=None)
    for linen in (model, gated):
        variables = linen.init(jax.random.key(0), normal((2, 8)))
        assert not variables.keys() & {"Alpha", "StreamWeight"}
    params = variables["params"]

    def loss(params):
        return jnp.square(gated.apply({"params": params}, normal((2, 8))) - 1).mean()

    grads = jax.grad(loss)(params)
    trained = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert (trained["blocks"]["alpha"] != 0).all()
    assert loss(trained) < loss(params)


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


@pytest.mark.parametrize("scan", [True, False])
def test_kinds_of_parameters(scan):
    labels = nnx.to_flat_state(parameter_labels(nnx.eval_shape(lambda: Own(nnx.Rngs(0), scan))))
    found = {
        "/".join(str(key) for key in path if not isinstance(key, int)): v for path, v in labels
    }
    gates = {"alpha", "mix", "spread", "mix_scale", "spread_scale"}
    for path, kind in found.items():
        name = path.split("/")[-1]
        is_vector = name.endswith("bias") or name == "scale"
        assert kind == ("gate" if name in gates else "vector" if is_vector else "matrix"), path
    assert {"attention/query/bias", "inner/encoder/layers/blocks/attention/qkv_bias"} <= set(found)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_only_matrices_decay_and_muon_takes_the_layers_matrices(scan):
    model = Own(nnx.Rngs(0), scan)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    decay = optax.adamw(1.0, weight_decay=0.5, mask=decay_mask(model))
    optimizer = nnx.Optimizer(model, decay, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, before))
    after, labels = (
        dict(nnx.to_flat_state(t)) for t in (nnx.state(model, nnx.Param), parameter_labels(model))
    )
    for path, old in nnx.to_flat_state(before):
        factor = 0.5 if labels[path] == "matrix" else 1.0
        np.testing.assert_array_equal(after[path][...], factor * old[...], err_msg=str(path))

    dimensions = muon_dimensions(model)
    muon = optax.contrib.muon(0.1, muon_weight_dimension_numbers=dimensions)
    nnx.Optimizer(model, muon, wrt=nnx.Param).update(model, before)
    chosen = {path for path, one in nnx.to_flat_state(dimensions) if one is not None}
    assert all(labels[path] == "matrix" for path in chosen)
    names = {(path[0], path[-1]) for path in chosen}
    assert {("nested", "kernel"), ("streams", "kernel"), ("inner", "qkv")} <= names
    assert ("attention", "kernel") not in names  # not of the layers
    params = nnx.to_pure_dict(before)  # a nested dict of arrays
    groups = dict.fromkeys(("gate", "matrix", "vector"), optax.sgd(0.1))
    tx = optax.partition(groups, nnx.to_pure_dict(parameter_labels(model)))
    tx.update(params, tx.init(params), params)
    with pytest.raises(UserError, match="give the model"):
        decay_mask(before)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_computes_in_64_bits_unless_its_input_has_them(name):
    with jax.enable_x64(True):
        inputs = made(name)[1]

        def loss(model, *inputs):
            return jnp.square(model(*inputs)).sum()

        text = str(jax.make_jaxpr(lambda *inputs: jax.grad(loss)(made(name)[0], *inputs))(*inputs))
    assert not re.search(WIDE, text)


def test_no_rule_computes_in_64_bits():
    with jax.enable_x64(True):
        for rule in sorted(RULES.keys() - {"sub_norm"}):
            make = partial(MLP, 4, 6, 2, 3, rule)
            jaxpr = jax.make_jaxpr(lambda x, make=make: make(rngs=nnx.Rngs(0))(x))(normal((2, 4)))
            assert not re.search(WIDE, str(jaxpr)), rule
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
    ["transformer", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mlp", "resnet", "vit"))],
)
def test_64_bits_change_no_bit_of_a_run_that_began_without_them(family, trained, copy_of):
    folder = copy_of(family, 4)
    with jax.enable_x64(True):
        loop.train(FAMILIES[family].load_config(), folder)
    assert differences(folder, trained(family)) == []


@pytest.mark.devices(4)
@pytest.mark.parametrize("name", MODULES)
def test_explicit_meshes_work_or_are_refused(name):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        model, inputs = made(name)
        rows = NamedSharding(mesh, PartitionSpec("data"))
        sharded = [jax.device_put(one, rows) for one in inputs]
        if name in ("resnet", "transformer", "vit"):
            with pytest.raises(UserError, match="explicit mesh axes"):
                model(*sharded)
            return
        outputs = call(model, *sharded)
    np.testing.assert_allclose(outputs, call(made(name)[0], *inputs), rtol=1e-5, atol=1e-5)


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
        model = Transformer(*sizes, kv_heads=integer(1), dropout=np.float32(0), rngs=nnx.Rngs(0))
        assert model(text).shape == (1, 4, 11)
        assert FAMILIES["resnet"].make(depth=integer(8), rngs=nnx.Rngs(0)).in_channels == 2
        assert len(Stack(block, integer(3), scan=False, rngs=nnx.Rngs(0))) == 3
    for depth in (2.0, "3", jnp.float32(3)):
        with pytest.raises(UserError, match="whole number"):
            MLP(4, 8, depth, 3, rngs=nnx.Rngs(0))
