"""Initial distributions that JAX does not bring along."""

import jax
import numpy as np
from jax.nn.initializers import Initializer


def torch_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of PyTorch's Linear and convolution layers.

    PyTorch draws biases from the same interval as the weights, which is why `fan_in` is given: a
    bias's own shape does not tell it.
    """
    bound = 1.0 / np.sqrt(fan_in)

    def initialise(key, shape, dtype=np.float32, out_sharding=None):  # type: ignore[no-untyped-def]
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return initialise
