"""A scanned stack against its unrolled twin: outputs, gradients, parameters, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from rezero_jax import ReZero, devices
from rezero_jax.errors import UserError
from rezero_jax.residual import Place, RuleConfig, make_rule
from rezero_jax.stack import REMAT_POLICIES, Stack
from tests import families

X = jax.random.normal(jax.random.key(0), (6, 8))


class Block(nnx.Module):
    def __init__(self, residual, rngs, layer, depth):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        place = Place(layer, depth, 1, 2)
        self.rule = make_rule(RuleConfig(residual, alpha_init=0.2), 8, place=place, rngs=rngs)

    def __call__(self, x):
        return self.rule(x, lambda x: jnp.tanh(self.linear(x)))


class BatchNormBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + 0.5 * self.linear(self.norm(x))


def make(residual="rezero", depth=5, **kwargs):
    return Stack(
        lambda rngs, layer: Block(residual, rngs, layer, depth),
        depth,
        numbered=True,
        rngs=nnx.Rngs(3),
        **kwargs,
    )


def value_and_grad(stack, x=X):
    return jax.jit(jax.value_and_grad(lambda stack: jnp.sum(jnp.sin(stack(x)))))(stack)


def leaves(stack):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(stack)]


def assert_close(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("residual", ["peri_norm", "layerscale"])
def test_scanned_equals_unrolled(residual):
    scanned, unrolled = make(residual), make(residual, scan=False)
    for x, y in zip(leaves(families.unrolled(scanned)), leaves(unrolled), strict=True):
        np.testing.assert_array_equal(x, y)
    # A norm after a branch of small variance cancels in float32, so the twins compute in float64.
    with jax.enable_x64(True):
        twins = [jax.tree.map(lambda p: p.astype(jnp.float64), t) for t in (scanned, unrolled)]
        x = X.astype(jnp.float64)
        (value, gradient), (twin_value, twin_gradient) = (value_and_grad(t, x) for t in twins)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, twin_value, rtol=1e-10)
    for x, y in zip(leaves(families.unrolled(gradient)), leaves(twin_gradient), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("scan", [True, False])
def test_a_numbered_stack_numbers_its_blocks(scan):
    """1 .. depth, and the parameters are those of a stack that does not."""

    class Numbered(nnx.Module):
        def __init__(self, rngs, layer=0):
            self.linear = nnx.Linear(8, 8, rngs=rngs)
            self.number = nnx.Variable(jnp.asarray(layer, jnp.float32))

        def __call__(self, x):
            return 10 * x + self.number[...].reshape(1, 1)

    options = {"scan": scan, "rngs": nnx.Rngs(3)}
    stack = Stack(Numbered, 4, numbered=True, **options)
    np.testing.assert_array_equal(stack(jnp.zeros((1, 1))), [[1234.0]])
    same = Stack(Numbered, 4, scan=scan, rngs=nnx.Rngs(3))
    for x, y in zip(
        leaves(nnx.state(stack, nnx.Param)), leaves(nnx.state(same, nnx.Param)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.devices(4)
@pytest.mark.parametrize("scan", [True, False])
def test_blocks_are_items_whose_partition_names_are_of_one_layer(scan):
    names = {"out_sharding": PartitionSpec(None, "model")}
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        stack = Stack(
            lambda rngs: nnx.Linear(8, 8, kernel_metadata=names, rngs=rngs),
            np.int64(3),
            scan=scan,
            rngs=nnx.Rngs(0),
        )
        kernel = (stack.blocks if scan else stack.blocks[0]).kernel
        spec = PartitionSpec(*(None,) * scan, None, "model")
        assert kernel[...].sharding.spec == spec
        assert nnx.get_partition_spec(kernel).get_value() == spec
        assert len(stack) == len(list(stack)) == 3
        for i, block in enumerate(stack.layers()):
            for twin in (stack[i], stack[i - 3], stack[i:][0], stack[np.int32(i)]):
                np.testing.assert_array_equal(twin.kernel[...], block.kernel[...])
                assert tuple(twin.kernel.get_metadata("out_sharding")) == (None, "model")
        x = X
        for block in stack:
            x = block(x)
        np.testing.assert_allclose(stack(X), x, rtol=1e-5, atol=1e-5)
    with pytest.raises(IndexError):
        stack[3]


class TiedBlock(nnx.Module):
    """Two linear layers that share their kernel, and one that is applied twice."""

    def __init__(self, rngs):
        self.first, self.second, self.third = (nnx.Linear(8, 8, rngs=rngs) for _ in range(3))
        self.second.kernel = self.first.kernel
        self.again = self.third

    def __call__(self, x):
        h = jnp.tanh(self.second(jnp.tanh(self.first(x))))
        return x + self.again(jnp.tanh(self.third(h)))


def test_weights_tied_within_a_block_stay_tied():
    scanned, unrolled = (Stack(TiedBlock, 3, scan=s, rngs=nnx.Rngs(3)) for s in (True, False))
    for stack in (scanned, unrolled):
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(stack))) == 3 * (2 * 64 + 3 * 8)
        for block in (*stack.layers(), *families.unrolled(stack).layers()):
            assert block.second.kernel is block.first.kernel
            assert block.again is block.third

    def by_hand(blocks):
        x = X
        for first, third, bias in blocks:
            h = jnp.tanh(x @ first.kernel + first.bias.reshape(1, 8))
            h = jnp.tanh(h @ first.kernel + bias.reshape(1, 8))
            h = jnp.tanh(h @ third.kernel + third.bias.reshape(1, 8))
            x = x + h @ third.kernel + third.bias.reshape(1, 8)
        return jnp.sum(jnp.sin(x))

    parts = [(one.first, one.third, one.second.bias[...]) for one in unrolled.layers()]
    expected = jax.jit(jax.grad(by_hand))(parts)
    for stack in (scanned, unrolled):
        graphdef, params = nnx.split(stack)
        loss = lambda params, g=graphdef: jnp.sum(jnp.sin(nnx.merge(g, params)(X)))  # noqa: E731
        layers = nnx.merge(graphdef, jax.jit(jax.grad(loss))(params)).layers()
        found = [(one.first, one.third, one.second.bias[...]) for one in layers]
        assert_close(found, expected)


def test_rematerialised_gradients_are_the_same():
    plain_value, plain_gradient = value_and_grad(make())
    for remat in REMAT_POLICIES.keys() - {"none"}:
        value, gradient = value_and_grad(make(remat=remat))
        np.testing.assert_allclose(value, plain_value, rtol=1e-6)
        assert_close(gradient, plain_gradient)


class WideBlock(nnx.Module):
    """A branch that is much wider than the trunk, so that what it keeps outweighs the trunk."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 64, rngs=rngs)
        self.down = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(jnp.sin(self.up(x))))


def test_rematerialisation_saves_memory():
    def temporary_bytes(remat):
        stack = Stack(WideBlock, 50, remat=remat, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(stack)
        loss = jax.grad(lambda params: nnx.merge(graphdef, params)(jnp.ones((256, 8))).sum())
        return jax.jit(loss).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < 0.5 * temporary_bytes("dots")
    assert temporary_bytes("dots") < 0.75 * temporary_bytes("none")


@pytest.mark.parametrize(("scan", "barriers"), [(True, 0), (False, 5)])
def test_only_in_a_loop_xla_could_not_use_the_results_of_the_forward_pass(scan, barriers):
    """A barrier before each unrolled block keeps it from undoing the rematerialisation."""
    graphdef, params = nnx.split(make(remat="full", scan=scan))
    loss = jax.grad(lambda params: nnx.merge(graphdef, params)(X).sum())
    assert jax.jit(loss).lower(params).as_text().count("optimization_barrier") == barriers


def test_running_statistics_come_out_of_the_scan():
    def run(scan):
        stack = Stack(BatchNormBlock, 4, scan=scan, remat="full", rngs=nnx.Rngs(0))
        for _ in range(3):
            stack(X)
        return families.unrolled(stack)

    scanned, unrolled = run(True), run(False)
    assert_close(scanned, unrolled)
    assert np.abs(scanned.blocks[0].norm.mean[...]).max() > 1e-3


def test_compiled_code_does_not_grow_with_depth():
    def size(depth):
        graphdef, params = nnx.split(make(depth=depth))
        run = jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params)(X).sum()))
        return len(run.lower(params).as_text())

    assert size(1000) < 1.05 * size(10)


def test_thousand_gated_layers_are_the_identity_and_so_is_their_jacobian():
    stack = Stack(lambda rngs: ReZero(nnx.Linear(8, 8, rngs=rngs)), 1000, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(stack(X), X)
    jacobian = jax.jacobian(stack)(X[0])
    np.testing.assert_array_equal(jacobian, np.eye(8))


def test_bad_arguments_are_user_errors():
    with pytest.raises(UserError, match="depth is 0"):
        make(depth=0)
    with pytest.raises(UserError, match="remat policy"):
        make(remat="some")


@pytest.mark.parametrize(("platform", "unroll"), [("cpu", 1), ("tpu", 3), ("gpu", 9)])
def test_accelerators_run_several_blocks_in_an_iteration(platform, unroll, monkeypatch):
    """The largest divisor of 9 blocks up to 4 or 9, so that nothing is left over."""
    options = {"unroll": 4, "gpu_unroll": 9, "rngs": nnx.Rngs(0)}
    stack = Stack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), 9, **options)
    x = jnp.ones((2, 4))
    expected = stack(x)
    monkeypatch.setattr(devices, "target", lambda: devices.Target(platform, ""))
    graphdef, state = nnx.split(stack)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    (scan,) = [one for one in jaxpr.eqns if one.primitive.name == "scan"]
    assert scan.params["unroll"] == unroll
    np.testing.assert_allclose(stack(x), expected, rtol=1e-6)


@pytest.mark.parametrize("residual", ["rezero", "peri_norm", "hyper_connections"])
def test_a_gpus_chained_backward_pass_has_the_gradients_of_a_scan(residual, monkeypatch):
    """And batches the products of the parameters' gradients over layers."""
    stack = make(residual, depth=6, gpu_chain=True)
    gradient = jax.grad(lambda stack, x: jnp.sum(jnp.sin(stack(x))), argnums=(0, 1))
    with jax.enable_x64(True):  # the order of sums is not the same
        stack = jax.tree.map(lambda p: p.astype(jnp.float64), stack)
        x = stack.blocks.rule.enter(X.astype(jnp.float64))
        expected = jax.jit(gradient)(stack, x)
        monkeypatch.setattr(devices, "target", lambda: devices.Target("gpu", ""))
        chained = lambda stack, x: gradient(stack, x)  # noqa: E731  # traced anew
        found = jax.jit(chained)(stack, x)
        jaxpr = jax.make_jaxpr(chained)(stack, x)
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)
    (back,) = [one for one in jaxpr.eqns if one.primitive.name == "scan" and one.params["reverse"]]
    assert "[6,8,8]" not in str([v.aval.str_short() for v in back.outvars])
