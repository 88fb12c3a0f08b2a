"""The vision Transformer: parity with timm, the identity at the start, scans, parameter counts."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rezero_jax import ViT
from rezero_jax.errors import UserError
from rezero_jax.models.weights import from_torch, to_torch
from rezero_jax.training.state import model_spec
from tests.families import stored, under

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
    again = to_torch(model)
    assert again.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value)
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


@pytest.mark.parametrize("residual", ["rezero", "post_norm", "sub_norm"])
def test_timm_has_no_other_rule(residual):
    model = nnx.eval_shape(lambda: SMALL(residual=residual, final_norm=True, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match='timm has residual="pre_norm"'):
        to_torch(model)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [  # of timm 1.0's vit_tiny_patch16_224 and vit_base_patch16_224
        ((224, 16, 192, 12, 3, 1000), 5_717_416),
        ((224, 16, 768, 12, 12, 1000), 86_567_656),
    ],
)
def test_parameters_are_as_many_as_timms(sizes, count):
    def parameters(residual):
        return model_spec(lambda rngs: ViT(*sizes, residual, rngs=rngs)).parameter_count

    width, depth = sizes[2:4]
    assert parameters("pre_norm") == count
    assert parameters("rezero") == count - (2 * depth + 1) * 2 * width + depth


def test_a_patch_keeps_its_pixels_and_its_place():
    model = SMALL(pool="mean", rngs=nnx.Rngs(0))
    x = np.asarray(model.embed(IMAGES) - model.position[...][None])
    kernel, bias = (np.asarray(p[...]) for p in (model.embedding.kernel, model.embedding.bias))
    images = np.asarray(IMAGES)
    for i in range(3):
        for j in range(3):
            pixels = images[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(4, -1)
            np.testing.assert_allclose(
                x[:, 3 * i + j], pixels @ kernel + bias, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"patch": 4}, "patch=4"),
        ({"patch": 12}, "patch=12"),
        ({"patch": 0}, "patch is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"pool": "avg"}, 'pool "avg"'),
        ({"heads": 5}, "heads=5"),
        ({"residual": "rezro"}, '"rezero"'),
    ],
)
def test_invalid_sizes_and_names(fields, text):
    sizes = {"image_size": 6, "patch": 2, "width": 12, "depth": 2, "heads": 3, "num_classes": 5}
    with pytest.raises(UserError, match=text):
        nnx.eval_shape(lambda: ViT(**sizes | fields, rngs=nnx.Rngs(0)))


def test_dropout_and_stochastic_depth_train_in_a_loop_of_ones_own():
    model = SMALL(residual="pre_norm", dropout=0.2, stochastic_depth=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="dropout needs rngs"):
        model(IMAGES)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    labels = jnp.arange(len(IMAGES))

    @nnx.jit
    def update(model, optimizer, rngs):
        def loss(model, rngs):
            logits = model(IMAGES, rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = nnx.value_and_grad(loss)(model, rngs)
        optimizer.update(model, grads)
        return value

    rngs = nnx.Rngs(dropout=1)
    losses = [float(update(model, optimizer, rngs)) for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    one, other = (model(IMAGES, rngs=rngs) for _ in range(2))
    assert not np.array_equal(one, other)
    model.eval()
    np.testing.assert_array_equal(model(IMAGES), model(IMAGES, rngs=rngs))


def test_no_images_have_no_logits():
    assert SMALL(rngs=nnx.Rngs(0))(IMAGES[:0]).shape == (0, 5)


@pytest.mark.usefixtures("unchecked")
def test_images_of_another_size():
    model = SMALL(rngs=nnx.Rngs(0))
    for images in (IMAGES[:, :4], IMAGES[..., :1], IMAGES.transpose(0, 3, 1, 2), IMAGES[0]):
        with pytest.raises(UserError, match=r"takes images \(batch, 6, 6, 3\), not"):
            model(images)
