"""The residual networks: parity with PyTorch, identity, scan and unroll, parameter counts."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from rezero_jax import Alpha, ResNet
from rezero_jax.errors import UserError
from rezero_jax.models.blocks import GATED, NORM_FREE, RULES
from rezero_jax.stack import stacked, unstacked
from rezero_jax.training.state import skeleton

CIFAR = functools.partial(ResNet.cifar, 14, num_classes=5, width=2, scan=True)
PREACT = functools.partial(ResNet.preact, 18, num_classes=5, width=1, scan=True)
PREACT50 = functools.partial(ResNet.preact, 50, num_classes=5, width=1, scan=True)
CASES = {
    "cifar_residual": functools.partial(CIFAR, residual="residual"),
    "cifar_zero_gamma": functools.partial(CIFAR, residual="zero_gamma"),
    "cifar_gated": functools.partial(CIFAR, residual="gated"),
    "cifar_rezero": functools.partial(CIFAR, residual="rezero"),
    "cifar_skipinit": functools.partial(CIFAR, residual="skipinit"),
    "cifar_fixup": functools.partial(CIFAR, residual="fixup"),
    "cifar_rezero_no_norm": functools.partial(CIFAR, residual="rezero", batch_norm=False),
    "cifar_rezero_subsample": functools.partial(CIFAR, residual="rezero", variant="notebook"),
    "preact_residual": functools.partial(PREACT, residual="residual"),
    "preact_gated": functools.partial(PREACT, residual="gated"),
    "preact_rezero": functools.partial(PREACT, residual="rezero"),
    "preact_skipinit": functools.partial(PREACT, residual="skipinit"),
    "preact_fixup": functools.partial(PREACT, residual="fixup"),
    "preact_rezero_no_norm": functools.partial(PREACT, residual="rezero", batch_norm=False),
    "preact_rezero_imagenet": functools.partial(PREACT, residual="rezero", stem="imagenet"),
    "preact50_rezero": functools.partial(PREACT50, residual="rezero"),
    "preact50_fixup": functools.partial(PREACT50, residual="fixup"),
}


@functools.cache
def stored():
    """The arrays of resnet.npz; tests/reference/make_resnet.py says how they are packed."""
    path = Path(__file__).parent / "reference" / "resnet.npz"
    with np.load(path, allow_pickle=False) as file:
        layout = json.loads(file["layout"].item())
        values = np.ascontiguousarray(file["values"].T).view("<f4").ravel()
    arrays, start = {}, 0
    for name, dtype, shape in layout:
        end = start + math.prod(shape)
        arrays[name] = values[start:end].reshape(shape).astype(dtype)
        start = end
    return arrays


def live():
    pytest.importorskip("torch", reason="PyTorch is not installed; the stored numbers are tested")
    from tests.reference.make_resnet import all_references

    return all_references()


@pytest.fixture(scope="module", params=["stored", "live"])
def references(request):
    """What PyTorch computes: from the file, and anew where PyTorch is installed."""
    return stored() if request.param == "stored" else live()


def part(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def nested(flat):
    paths = {tuple(int(p) if p.isdigit() else p for p in k.split("/")): v for k, v in flat.items()}
    return traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, paths))


def flat(tree):
    return {"/".join(map(str, k)): v for k, v in traverse_util.flatten_dict(tree).items()}


def assert_close(ours, theirs, rtol, atol):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_same_as_pytorch_in_training_and_evaluation(case, references):
    arrays = part(references, f"{case}/")
    structure = skeleton(lambda rngs: CASES[case](rngs=rngs))
    params, stats = nested(part(arrays, "params/")), nested(part(arrays, "stats/"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, structure.shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == structure.parameter_count

    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, stats, images, labels):
        model = structure.model(params, stats)
        logits = model(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return losses.mean(), (logits, losses.mean(), stats)

    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4), optax.trace(0.9), optax.scale_by_learning_rate(0.05)
    )
    opt_state = optimizer.init(params)
    gradient = jax.jit(gradient)
    for i in range(3):
        images, labels = jnp.asarray(arrays["images"][i]), jnp.asarray(arrays["labels"][i])
        grads, (logits, loss, stats) = gradient(params, stats, images, labels)
        if i == 0:
            np.testing.assert_allclose(logits, arrays["logits"], rtol=2e-5, atol=5e-6)
            np.testing.assert_allclose(loss, arrays["loss"], rtol=2e-5)
            assert_close(flat(grads), part(arrays, "grads/"), rtol=1e-4, atol=5e-6)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_close(flat(params), part(arrays, "params_after/"), rtol=1e-4, atol=1e-5)
    assert_close(flat(stats), part(arrays, "stats_after/"), rtol=1e-4, atol=1e-5)
    model = structure.model(params, stats)
    model.eval()
    logits = model(jnp.asarray(arrays["images"][0]))
    np.testing.assert_allclose(logits, arrays["eval_logits"], rtol=1e-4, atol=1e-5)
