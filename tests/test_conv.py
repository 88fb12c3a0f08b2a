"""The convolution: its definition, JAX's own gradients, and the form that is fast on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax.models.resnet import conv
from rezero_jax.models.resnet.config import PreactConfig
from rezero_jax.models.resnet.conv import convolve
from tests.families import OPTIMISED, normal


@pytest.mark.parametrize(("stride", "size"), [(1, (8, 8)), (2, (8, 8)), (2, (9, 7))])
def test_output_and_gradients_equal_the_plain_convolutions(stride, size):
    for side, cin, cout in ((1, 3, 5), (3, 3, 16), (7, 3, 5)):
        x, kernel = normal((2, *size, cin)), normal((side, side, cin, cout), 1)

        @jax.jit
        def with_gradients(x, kernel):
            forms = [lambda x, k: conv._plain(x, k, stride), lambda x, k: convolve(x, k, stride)]
            results = [jax.vjp(form, x, kernel) for form in forms]
            return [(y, *back(normal(y.shape, 2))) for y, back in results]

        for plain, ours in zip(*with_gradients(x, kernel), strict=True):
            np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.cpu
@pytest.mark.parametrize("stride", [1, 2])
def test_inside_a_loop_every_convolution_has_the_form_that_is_fast_on_a_cpu(stride):
    """In another form the weight gradient of ResNet-20 takes half a minute a step."""
    x, kernel = normal((4, 8, 8, 16)), normal((3, 3, 16, 16), 1)

    def loss(kernel):
        return jnp.square(convolve(convolve(x, kernel, stride), kernel)).sum()

    def descend(kernel, steps):
        return jax.lax.fori_loop(0, steps, lambda _, k: k - 1e-3 * jax.grad(loss)(k), kernel)

    compiled = jax.jit(descend).lower(kernel, jnp.int32(3)).compile(OPTIMISED)
    forms = re.findall(r"convolution\(.*?dim_labels=([^,\s]+)", compiled.as_text())
    assert len(forms) >= 5
    assert set(forms) == {"b01f_01io->b01f"}


def test_works_under_vmap_jacrev_and_remat():
    x, kernel = normal((3, 1, 4, 4, 2)), normal((3, 3, 2, 3), 1)
    many = jax.jit(jax.vmap(convolve, (0, None)))(x, kernel)
    np.testing.assert_allclose(many[1], convolve(x[1], kernel), rtol=1e-5, atol=1e-6)
    jacobian = jax.jacrev(lambda x: convolve(x, kernel).ravel())(x[0])
    np.testing.assert_allclose(
        jnp.einsum("ybhwc,bhwc->y", jacobian, x[0]), many[0].ravel(), rtol=1e-4, atol=1e-5
    )
    grad = jax.grad(lambda k: convolve(x[0], k).sum())
    again = jax.grad(jax.checkpoint(lambda k: convolve(x[0], k).sum()))
    np.testing.assert_array_equal(grad(kernel), again(kernel))


def test_module_has_pytorchs_default_distribution_and_a_bias_without_norms():
    layer = PreactConfig(batch_norm=False).conv(64, 64, 3, rngs=nnx.Rngs(0))
    bound = 1 / np.sqrt(9 * 64)
    for values in (layer.kernel[...], layer.bias[...]):
        assert 0.9 * bound < np.abs(values).max() <= bound
    np.testing.assert_allclose(layer.kernel[...].var(), bound**2 / 3, rtol=0.05)
    x = normal((1, 4, 4, 64))
    expected = convolve(x, layer.kernel[...]) + layer.bias[...].reshape(1, 1, 1, -1)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6)
    assert PreactConfig().conv(4, 4, 3, rngs=nnx.Rngs(0)).bias is None
