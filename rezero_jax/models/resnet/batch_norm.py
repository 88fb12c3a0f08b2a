"""Batch normalisation with PyTorch's semantics and few passes over memory."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from rezero_jax.errors import UserError


class BatchNorm(nnx.Module):
    """y = scale (x - mean) / sqrt(var + 1e-5) + bias, per channel.

    In training, mean and (biased) variance are taken over every axis except the last. The running
    statistics move a tenth of the way to the batch's mean and unbiased variance, as in
    `torch.nn.BatchNorm2d`. After `model.eval()` the running statistics are used instead.

    Under jit the statistics cover the whole batch, on any number of devices. With gradient
    accumulation, each microbatch is normalised by its own statistics and updates the running
    statistics once, as in PyTorch.

    Args:
      features: number of channels, the size of the last axis.
      scale_init: initial scale.
    """

    momentum = 0.1
    epsilon = 1e-5

    def __init__(self, features: int, *, scale_init: float = 1.0):
        self.scale = nnx.Param(jnp.full((features,), scale_init, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((features,), jnp.float32))
        self.use_running_average = False  # set by model.eval() and model.train()

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode of a copy that `nnx.view` makes.

        Args:
          use_running_average: whether to use the running statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Returns y in the dtype of x; statistics are computed in float32."""
        # Centring at the running mean keeps the sum of squares accurate when the mean is large
        # compared with the spread, and needs one pass over x for both moments. With the output
        # written as centred * a + b, autodiff yields the closed form of the gradient: two sums over
        # the batch in one pass, and one pass to write dx.
        shift = self.mean[...]
        centred = x.astype(jnp.float32) - _per_channel(shift, x)
        if self.use_running_average:
            mean, var = jnp.zeros_like(shift), self.var[...]
        else:
            if x.size == 0:
                raise UserError("a batch of no examples has no statistics; skip it in training")
            axes = tuple(range(x.ndim - 1))
            mean = centred.mean(axes)
            var = jnp.maximum(jnp.square(centred).mean(axes) - jnp.square(mean), 0.0)
            count = x.size // x.shape[-1]
            unbiased = jax.lax.stop_gradient(var) * (count / max(count - 1, 1))
            self.mean[...] += self.momentum * jax.lax.stop_gradient(mean)  # relative to `shift`
            self.var[...] += self.momentum * (unbiased - self.var[...])
        a = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        b = self.bias[...] - mean * a
        return (centred * _per_channel(a, x) + _per_channel(b, x)).astype(x.dtype)


def _per_channel(values: Array, x: Array) -> Array:
    return values.reshape((1,) * (x.ndim - 1) + (-1,))
