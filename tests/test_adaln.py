"""adaLN-Zero against its equations in NumPy, whose gradients are complex steps; the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax import AdaLNZero, Stack

RNG = np.random.default_rng(0)
SIZES = {
    "x": (2, 3, 4),
    "c": (2, 5),
    "kernel": (5, 12),
    "bias": (12,),
    "f_kernel": (4, 4),
    "f_bias": (4,),
}
ARRAYS = {name: RNG.normal(size=shape) for name, shape in SIZES.items()}
COTANGENT = RNG.normal(size=SIZES["x"])


def equations(x, c, kernel, bias, f_kernel, f_bias):
    """Of figure 3 of the DiT paper, with F(h) = tanh(W h + b)."""
    shift, scale, gate = np.split((c / (1 + np.exp(-c)) @ kernel + bias)[:, None], 3, axis=-1)
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x + gate * np.tanh(((1 + scale) * normed + shift) @ f_kernel + f_bias)


class Tanh(nnx.Linear):
    def __call__(self, x):
        return nnx.tanh(super().__call__(x))


def ours(x, c, kernel, bias, f_kernel, f_bias):
    block = AdaLNZero(Tanh(4, 4, rngs=nnx.Rngs(0)), 4, 5, rngs=nnx.Rngs(0))
    block.modulation.kernel[...], block.modulation.bias[...] = kernel, bias
    block.f.kernel[...], block.f.bias[...] = f_kernel, f_bias
    return block(x, c)


def test_output_and_gradients_are_those_of_the_equations():
    def loss(arrays):
        out = ours(**arrays)
        return (out * COTANGENT).sum(), out

    given = {name: jnp.asarray(value, jnp.float32) for name, value in ARRAYS.items()}
    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
    np.testing.assert_allclose(out, equations(**ARRAYS), rtol=1e-5, atol=1e-5)
    for name, value in ARRAYS.items():
        expected = np.empty_like(value)
        for place in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[place] += 1e-30j
            moved_out = equations(**ARRAYS | {name: moved})
            expected[place] = (moved_out * COTANGENT).sum().imag / 1e-30
        np.testing.assert_allclose(grads[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_stack_is_the_identity_and_the_gates_alone_move_first():
    stack = Stack(
        lambda rngs: AdaLNZero(nnx.Linear(4, 4, rngs=rngs), 4, 5, rngs=rngs), 3, rngs=nnx.Rngs(0)
    )
    x, c = (jnp.asarray(ARRAYS[name], jnp.float32) for name in "xc")
    np.testing.assert_array_equal(stack(x, c), x)
    grads = nnx.jit(nnx.grad(lambda stack: (stack(x, c) * COTANGENT).sum()))(stack).blocks
    for grad in (grads.f.kernel, grads.f.bias):
        assert (grad[...] == 0).all()
    for grad in (grads.modulation.kernel, grads.modulation.bias):
        rest, gates = grad[..., :8], grad[..., 8:]
        assert (rest == 0).all()
        assert (jnp.abs(gates).reshape(3, -1).max(axis=1) > 0).all()


def test_a_branch_of_another_shape():
    block = AdaLNZero(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), 4, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must keep the shape of the trunk"):
        block(jnp.ones((2, 3, 4)), jnp.ones((2, 5)))
