"""What holds in every family: identity at the start, scan, causality, exact resume."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax import Alpha
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop
from tests.families import FAMILIES, OPTIMISED, assert_trees_close, flat, tokens, train
from tests.faults.compare import differences

every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family, **options):
    """The tiny model, made in one compiled function."""
    return nnx.jit(lambda: FAMILIES[family].make(**options, rngs=nnx.Rngs(0)))()


@nnx.jit
def outputs_and_gradients(model, x):
    """The outputs, and the gradients of half their squared distance to 1."""

    def loss(model):
        outputs = model(x)
        return jnp.square(outputs - 1).mean() / 2, outputs

    grads, outputs = nnx.grad(loss, has_aux=True)(model)
    return outputs, grads


def by_path(tree):
    """{path: parameter}, gates apart from the others, and the parameters of branches."""
    params = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(tree)}
    gates = {path: np.asarray(p[...]) for path, p in params.items() if isinstance(p, Alpha)}
    branches = {
        path: np.asarray(param[...])
        for path, param in params.items()
        if re.search("/(blocks|entry)/", path) and "shortcut" not in path and path not in gates
    }
    return gates, branches


@pytest.mark.guarantee("identity at init")
@every_family
def test_at_the_start_no_branch_changes_a_bit_of_the_outputs(family):
    x = FAMILIES[family].example(3)
    forward = nnx.jit(lambda model: model(x))
    model = make(family)
    model.eval()  # in training, a BatchNorm's rounding depends on its statistics
    expected = forward(model)
    gates, branches = by_path(nnx.state(model, nnx.Param))
    rng = np.random.default_rng(0)
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "/".join(map(str, path)) in branches:
            param[...] = jnp.asarray(rng.normal(size=param.shape), jnp.float32)
    np.testing.assert_array_equal(forward(model), expected)
    if hasattr(model, "trunk"):
        inside = jnp.asarray(rng.normal(size=(3, 4, 8 if family != "mlp" else 6)), jnp.float32)
        np.testing.assert_array_equal(nnx.jit(lambda model: model.trunk(inside))(model), inside)
    assert gates
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "/".join(map(str, path)) in gates:
            param[...] += 0.5
    assert np.abs(forward(model) - expected).max() > 0.01


@pytest.mark.guarantee("gradient contract")
@every_family
def test_gates_learn_first_and_branches_after_one_update(family):
    x, model = FAMILIES[family].example(3), make(family, scan=True)
    _, grads = outputs_and_gradients(model, x)
    gates, branches = by_path(grads)
    assert gates
    for path, grad in gates.items():
        assert np.all(grad != 0), path
    for path, grad in branches.items():
        np.testing.assert_array_equal(grad, 0, err_msg=path)
    params = nnx.state(model, nnx.Param)
    step = jax.jit(partial(jax.tree.map, lambda p, g: p - 0.1 * g))
    nnx.update(model, step(params, grads))
    _, branches = by_path(outputs_and_gradients(model, x)[1])
    for path, grad in branches.items():
        if "kernel" in path:
            layers = grad.reshape(len(grad) if "/blocks/" in path else 1, -1)
            assert np.all(np.any(layers != 0, axis=1)), path


RULES = ("x0_scalars", "layernorm_scaling", "rezero_norm", "hyper_connections", "mhc")


@pytest.mark.guarantee("scanned equals unrolled")
@pytest.mark.parametrize(
    ("family", "rule"),
    [pytest.param(family, "rezero", id=family) for family in FAMILIES]
    + [pytest.param("transformer", rule, marks=pytest.mark.slow) for rule in RULES],
)
def test_scanned_equals_unrolled(family, rule):
    x, options = FAMILIES[family].example(3), {"residual": rule, "alpha_init": 0.5}
    scanned, unrolled = (make(family, scan=scan, **options) for scan in (True, False))
    starts = [flat(nnx.to_pure_dict(nnx.state(m, nnx.Param))) for m in (scanned, unrolled)]
    one, twin = stacked(starts[0]), stacked(starts[1])
    assert one.keys() == twin.keys()
    assert any("/blocks/" in path for path in one)
    for path, value in one.items():
        np.testing.assert_array_equal(twin[path], value, err_msg=path)
    (outputs, grads), (twin_outputs, twin_grads) = (
        outputs_and_gradients(model, x) for model in (scanned, unrolled)
    )
    np.testing.assert_allclose(twin_outputs, outputs, rtol=1e-5, atol=1e-5)
    grads, twin_grads = (stacked(flat(nnx.to_pure_dict(g))) for g in (grads, twin_grads))
    assert_trees_close(twin_grads, grads, rtol=1e-4, atol=1e-5)


def stacked(params):
    """The parameters, those of unrolled blocks stacked as those of scanned ones are."""
    found = {}
    for path in sorted(params, key=lambda path: [int(n) for n in re.findall(r"\d+", path)]):
        one = re.sub(r"/blocks/\d+/", "/blocks/", path)
        found.setdefault(one, []).append(params[path])
    is_list = any(re.search(r"/blocks/\d+/", path) for path in params)
    return {
        path: np.stack(values) if is_list and "/blocks/" in path else values[0]
        for path, values in found.items()
    }


@pytest.mark.guarantee("causality")
@pytest.mark.parametrize("options", [{"positions": "rotary"}, {"kv_heads": 1, "scan": False}])
def test_no_token_changes_what_comes_before_it(options):
    model = make("transformer", alpha_init=1.0, **options)
    text = tokens((1, 6))
    forward = nnx.jit(lambda model, text: model(text))
    expected = forward(model, text)
    for i in range(1, 6):
        logits = forward(model, text.at[0, i].set((text[0, i] + 1) % 11))
        np.testing.assert_array_equal(logits[0, :i], expected[0, :i])
        assert np.all(np.abs(logits[0, i:] - expected[0, i:]).max(axis=1) > 1e-4)


@pytest.mark.guarantee("resume")
@every_family
def test_a_resumed_run_ends_with_the_same_bits(family, trained, copy_of):
    folder = copy_of(family, 4)
    loop.train(FAMILIES[family].load_config(), folder)
    assert differences(folder, trained(family)) == []


@pytest.mark.guarantee("optimised")
@every_family
def test_all_optimisations_give_the_same_losses(family, trained, monkeypatch):
    expected = [line["train/loss"] for line in read_metrics(trained(family))]
    trainer, compiled = FAMILIES[family].trainer(), []
    jitted = trainer.jitted_dispatch

    def dispatch(*args):
        if not compiled:
            compiled.append(jitted.lower(*args).compile(OPTIMISED))
        return compiled[0](*args)

    monkeypatch.setattr(trainer, "jitted_dispatch", dispatch)
    np.testing.assert_allclose(train(trainer)[0], expected, rtol=1e-4)
