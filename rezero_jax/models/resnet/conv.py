"""Two-dimensional convolution on NHWC images, with gradients that are fast on every platform."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jaxtyping import Float

from rezero_jax.errors import UserError
from rezero_jax.models import init

Images = Float[Array, "batch _height _width _channels"]  # any shape; functions keep the batch size
Input = Float[Array, "batch height width in_channels"]
Output = Float[Array, "batch rows columns out_channels"]
Kernel = Float[Array, "side side in_channels out_channels"]


class Conv(nnx.Module):
    """A square convolution with PyTorch's padding (kernel // 2 zeros on each side).

    The gradient is custom: `jax.vjp` and the linear transpose of a vjp work, but forward-mode
    differentiation (jax.jvp, jax.jacfwd) does not.

    Args:
      in_channels, out_channels: sizes of the last axes of input and output.
      kernel: side of the kernel, odd.
      stride: pixels between outputs.
      bias: whether to add a bias; a BatchNorm after the convolution makes it redundant.
      kernel_init: initial distribution of the kernel; None is PyTorch's, U(-1/sqrt(fan_in),
        1/sqrt(fan_in)), which the bias always has.
      dtype: dtype of the computation; parameters are float32.

    Raises:
      UserError: a size below 1, or an even kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        bias: bool = False,
        kernel_init: Initializer | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(in_channels, out_channels) < 1 or kernel % 2 == 0:
            raise UserError(
                f"no convolution has a {kernel}x{kernel} kernel from {in_channels} to "
                f"{out_channels} channels; give a width and in_channels of at least 1 and an odd "
                "kernel"
            )
        uniform = init.torch_uniform(in_channels * kernel**2)
        shape = (kernel, kernel, in_channels, out_channels)
        kernel_value = (kernel_init or uniform)(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel_value, matrix_axes=((-4, -3, -2), (-1,)))
        self.bias = nnx.Param(uniform(rngs.params(), (out_channels,))) if bias else None
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Input) -> Output:
        kernel = self.kernel[...].astype(self.dtype)
        y = convolve(x.astype(self.dtype), kernel, self.stride)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)
        return y


def convolve(x: Input, kernel: Kernel, stride: int = 1) -> Output:
    """The convolution of x, padded by side // 2 zeros, at every `stride`-th pixel."""
    if kernel.shape[0] == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    return _convolve(x, kernel, stride)


# XLA's CPU backend has a fast kernel for one form of convolution with 32 output channels or more
# (jax 0.10.2). XLA rewrites the two convolutions of a gradient into that form, but not inside a
# loop, where they run twenty times slower. On a CPU, all three convolutions are therefore written
# in that form here; other platforms use the plain convolution and its automatic gradient.
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
        return _to_input(x.shape, kernel, dy, stride), _to_kernel(x, kernel.shape, dy, stride)

    return jax.lax.platform_dependent(*saved, dy, cpu=cpu, default=default)


_convolve.defvjp(_forward, _backward)


def _plain(x: Input, kernel: Kernel, stride: int) -> Output:
    pad = kernel.shape[0] // 2
    return _conv(x, kernel, strides=(stride, stride), padding=((pad, pad), (pad, pad)))


def _has_pairs(x: Input, kernel: Kernel, stride: int) -> bool:
    return kernel.shape[-1] == 16 and stride == 1 and x.shape[2] % 2 == 0


def _by_pairs(x: Input, kernel: Kernel) -> Output:
    """The convolution to 16 channels, as one to 32 channels of two neighbouring pixels.

    A quarter of the products have a zero factor; the fast kernel saves more time.
    """
    pad = kernel.shape[0] // 2
    left = jnp.pad(kernel, ((0, 0), (0, 1), (0, 0), (0, 0)))
    right = jnp.pad(kernel, ((0, 0), (1, 0), (0, 0), (0, 0)))
    pairs = jnp.concatenate([left, right], axis=-1)
    y = _conv(x, pairs, strides=(1, 2), padding=((pad, pad), (pad, pad)))
    return y.reshape(*x.shape[:3], kernel.shape[-1])


def _to_input(shape: tuple[int, ...], kernel: Kernel, dy: Output, stride: int) -> Input:
    """dL/dx: dy, spread to the pixels it came from, convolved with the flipped kernel."""
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    if _has_pairs(dy, flipped, stride):
        return _by_pairs(dy, flipped)
    side = kernel.shape[0]
    before = side - 1 - side // 2
    padding = tuple((before, n + side - 1 - before - _spread(n, stride)) for n in shape[1:3])
    return _conv(dy, flipped, padding=padding, lhs_dilation=(stride, stride))


def _to_kernel(x: Input, shape: tuple[int, ...], dy: Output, stride: int) -> Kernel:
    """dL/dkernel: x convolved with dy, with the batch axis in the role of the channels."""
    side = shape[0]
    padding = tuple(
        (side // 2, side - 1 - side // 2 - n + _spread(n, stride)) for n in x.shape[1:3]
    )
    # A loop transposes one row at a time: a transpose of all rows would write to memory in the
    # wrong order, and XLA would fuse it with the operations that made x and recompute these.
    rows = jax.lax.map(lambda row: row.transpose(2, 1, 0), x.swapaxes(0, 1))  # H C W B
    x, dy = rows.swapaxes(0, 1), dy.transpose(1, 2, 0, 3)
    return _conv(x, dy, padding=padding, rhs_dilation=(stride, stride)).transpose(1, 2, 0, 3)


def _spread(size: int, stride: int) -> int:
    """Pixels from the first to the last pixel at which a strided convolution is evaluated."""
    return (size - 1) // stride * stride + 1


def _conv(x: Array, kernel: Array, strides: tuple[int, int] = (1, 1), **options: Any) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )
