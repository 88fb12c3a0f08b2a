"""Two-dimensional convolution of NHWC images, with gradients that are fast on every platform.

Forward-mode differentiation (jax.jvp, jax.jacfwd) is not supported.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

Images = Float[Array, "batch _height _width _channels"]  # any shape; functions keep the batch size
Input = Float[Array, "batch height width in_channels"]
Output = Float[Array, "batch rows columns out_channels"]
Kernel = Float[Array, "side side in_channels out_channels"]

_conv = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def as_general(x: Array, kernel: Array, strides: tuple[int, int], *_: Any, **__: Any) -> Array:
    """Replaces `jax.lax.conv_general_dilated` in an `nnx.Conv` by `convolve`."""
    return convolve(x, kernel, strides[0])


def convolve(x: Input, kernel: Kernel, stride: int = 1) -> Output:
    """Convolves x, padded by side // 2 zeros, with a kernel of odd side length."""
    if kernel.shape[0] == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    return _convolve(x, kernel, stride)


# XLA's CPU backend has a fast kernel for one form of convolution with at least 32 output channels
# (jax 0.10.2). XLA rewrites the two convolutions of a gradient into that form, but not inside a
# loop, where they run twenty times slower. The CPU path therefore writes all three convolutions in
# that form; other platforms use the plain convolution and its automatic gradient.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Input, kernel: Kernel, stride: int) -> Output:
    plain = partial(_plain, stride=stride)
    return jax.lax.platform_dependent(
        x, kernel, cpu=_by_pairs if _has_pairs(x, kernel, stride) else plain, default=plain
    )


def _forward(x: Input, kernel: Kernel, stride: int) -> tuple[Output, tuple[Input, Kernel]]:
    return _convolve(x, kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple[Input, Kernel], dy: Output) -> tuple[Input, Kernel]:
    def default(x: Input, kernel: Kernel, dy: Output) -> tuple[Input, Kernel]:
        return jax.vjp(partial(_plain, stride=stride), x, kernel)[1](dy)

    def cpu(x: Input, kernel: Kernel, dy: Output) -> tuple[Input, Kernel]:
        pad = kernel.shape[0] // 2
        unused = [(size - 1) % stride for size in x.shape[1:3]]  # pixels after the last window
        return _to_input(kernel, dy, stride, pad, unused), _to_kernel(x, dy, stride, pad, unused)

    return jax.lax.platform_dependent(*saved, dy, cpu=cpu, default=default)


_convolve.defvjp(_forward, _backward)


def _plain(x: Input, kernel: Kernel, stride: int) -> Output:
    pad = kernel.shape[0] // 2
    return _conv(x, kernel, (stride, stride), ((pad, pad), (pad, pad)))


def _has_pairs(x: Input, kernel: Kernel, stride: int) -> bool:
    return kernel.shape[-1] == 16 and stride == 1 and x.shape[2] % 2 == 0


def _by_pairs(x: Input, kernel: Kernel) -> Output:
    """A convolution to 16 channels, computed as 32 channels: those of two neighbouring pixels.

    A quarter of the products have a zero factor, but the fast kernel more than compensates.
    """
    pad = kernel.shape[0] // 2
    left = jnp.pad(kernel, ((0, 0), (0, 1), (0, 0), (0, 0)))
    right = jnp.pad(kernel, ((0, 0), (1, 0), (0, 0), (0, 0)))
    pairs = jnp.concatenate([left, right], axis=-1)
    y = _conv(x, pairs, (1, 2), ((pad, pad), (pad, pad)))
    return y.reshape(*x.shape[:3], kernel.shape[-1])


def _to_input(kernel: Kernel, dy: Output, stride: int, pad: int, unused: list[int]) -> Input:
    """dL/dx: dy, dilated by the stride, convolved with the flipped kernel."""
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    if _has_pairs(dy, flipped, stride):
        return _by_pairs(dy, flipped)
    padding = [(pad, pad + n) for n in unused]
    return _conv(dy, flipped, (1, 1), padding, lhs_dilation=(stride, stride))


def _to_kernel(x: Input, dy: Output, stride: int, pad: int, unused: list[int]) -> Kernel:
    """dL/dkernel: x convolved with dy, with the batch axis as the channel axis."""
    # A loop transposes one row at a time: XLA would fuse a single transpose with the operations
    # that made x, recompute these, and write to memory in the wrong order.
    rows = jax.lax.map(lambda row: row.transpose(2, 1, 0), x.swapaxes(0, 1))  # H C W B
    x, dy = rows.swapaxes(0, 1), dy.transpose(1, 2, 0, 3)
    padding = [(pad, pad - n) for n in unused]
    return _conv(x, dy, (1, 1), padding, rhs_dilation=(stride, stride)).transpose(1, 2, 0, 3)
