"""Initial distributions that JAX lacks or compiles slowly, and layers that use them."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer


def identity(x: Array) -> Array:
    """Returns x, in the place of a norm that a model lacks; unlike nnx.identity it is picklable."""
    return x


def uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""

    def initialise(
        key: Array, shape: Sequence[int], dtype: Any = np.float32, out_sharding: Any = None
    ) -> Array:
        # A flat draw gives the same numbers and compiles three times faster than one with 4 axes.
        flat = jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound)
        return flat.reshape(shape, out_sharding=out_sharding)

    return initialise


def torch_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for a layer's weights and its bias."""
    return uniform(1.0 / np.sqrt(fan_in))


def linear(in_features: int, out_features: int, **options: Any) -> nnx.Linear:
    """nnx.Linear with PyTorch's initial distributions, unless the options name others."""
    start = torch_uniform(in_features)
    options = {"kernel_init": start, "bias_init": start} | options
    return nnx.Linear(in_features, out_features, **options)


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
    """U(-b, b) with b = sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    return uniform(math.sqrt(6 / (fan_in + fan_out)))


def times(gain: float, initializer: Initializer) -> Initializer:
    """The distribution multiplied by a gain."""
    return lambda *args, **kwargs: gain * initializer(*args, **kwargs)


def kaiming_normal(mode: Literal["fan_in", "fan_out"], scale: float = 1.0) -> Initializer:
    """Normal with deviation scale * sqrt(2 / fan), for kernels (..., in, out) (arXiv 1502.01852).

    The fan is the number of input (or output) channels times the size of the window.
    """

    def initialise(
        key: Array, shape: Sequence[int], dtype: Any = np.float32, out_sharding: Any = None
    ) -> Array:
        fan = math.prod(shape[:-2]) * shape[-2 if mode == "fan_in" else -1]
        flat = jax.random.normal(key, (math.prod(shape),), dtype) * (scale * math.sqrt(2 / fan))
        return flat.reshape(shape, out_sharding=out_sharding)

    return initialise
