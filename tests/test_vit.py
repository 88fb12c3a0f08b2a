"""The vision Transformer: parity with timm, dropout, parameter counts, mistakes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax import ViT
from rezero_jax.errors import UserError
from rezero_jax.models.weights import from_torch, to_torch
from rezero_jax.training.state import model_spec
from tests.families import drawn, stored, under

REFERENCE = stored("vit")
SMALL = partial(ViT, 6, 2, 12, 2, 3, 5, feedforward=24)
IMAGES = jnp.asarray(REFERENCE["token/images"])


@pytest.mark.guarantee("PyTorch parity")
@pytest.mark.parametrize(("pool", "scan"), [("token", True), ("mean", False)])
def test_logits_and_gradients_are_timms(pool, scan):
    model = nnx.eval_shape(
        lambda: SMALL(residual="pre_norm", pool=pool, scan=scan, rngs=nnx.Rngs(0))
    )
    state = under(f"{pool}/state/", REFERENCE)
    from_torch(model, state)
    given = under(f"{pool}/", REFERENCE)

    def loss(model, images):
        logits = model(images)
        return (logits * given["cotangent"]).sum(), logits

    value_and_grad = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, logits), (grads, grad_images) = nnx.jit(value_and_grad)(model, jnp.asarray(given["images"]))
    np.testing.assert_allclose(logits, given["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_images, given["grad_images"], rtol=1e-5, atol=1e-5)
    theirs = under(f"{pool}/grad/", REFERENCE)
    ours = nnx.clone(model)
    nnx.update(ours, grads)
    assert to_torch(ours).keys() == theirs.keys()
    for name, value in to_torch(ours).items():
        np.testing.assert_allclose(
            value, theirs[name], rtol=1e-5, atol=1e-5 * np.abs(theirs[name]).max(), err_msg=name
        )


def test_timm_has_no_other_rule():
    for residual in ("rezero", "post_norm", "sub_norm"):
        options = {"residual": residual, "final_norm": True}
        model = nnx.eval_shape(lambda options=options: SMALL(**options, rngs=nnx.Rngs(0)))
        with pytest.raises(UserError, match='timm has residual="pre_norm"'):
            to_torch(model)


def test_parameters_are_as_many_as_timms():
    for width, heads, count in ((192, 3, 5_717_416), (768, 12, 86_567_656)):  # of timm 1.0
        for residual, change in (("pre_norm", 0), ("rezero", 12 - 25 * 2 * width)):
            make = partial(ViT, 224, 16, width, 12, heads, 1000, residual)
            spec = model_spec(lambda rngs, make=make: make(rngs=rngs))
            assert spec.parameter_count == count + change


def test_invalid_sizes_and_names():
    sizes = {"image_size": 6, "patch": 2, "width": 12, "depth": 2, "heads": 3, "num_classes": 5}
    for fields, text in (
        ({"patch": 4}, "patch=4"),
        ({"patch": 0}, "patch is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"pool": "avg"}, 'pool "avg"'),
        ({"heads": 5}, "heads=5"),
        ({"residual": "rezro"}, '"rezero"'),
    ):
        with pytest.raises(UserError, match=text):
            ViT(**sizes | fields, rngs=nnx.Rngs(0))


def test_training_drops_by_its_rngs_and_evaluation_nothing():
    model = drawn(partial(SMALL, residual="pre_norm", dropout=0.5))
    with pytest.raises(UserError, match="dropout needs rngs"):
        model(IMAGES)
    forward = nnx.jit(lambda model, seed: model(IMAGES, rngs=nnx.Rngs(dropout=seed)))
    one, same, other = (forward(model, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    model.eval()
    np.testing.assert_array_equal(*(forward(model, jax.random.key(seed)) for seed in (0, 1)))


@pytest.mark.usefixtures("unchecked")
def test_images_of_another_size():
    model = nnx.eval_shape(lambda: SMALL(rngs=nnx.Rngs(0)))
    for images in (IMAGES[:, :4], IMAGES[..., :1], IMAGES.transpose(0, 3, 1, 2), IMAGES[0]):
        with pytest.raises(UserError, match=r"takes images \(batch, 6, 6, 3\), not"):
            model(images)
