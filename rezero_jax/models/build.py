"""From config.model to a model: the one place that knows the families by name."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from rezero_jax.errors import choose_from
from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet import ResNet

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_model(
    config: ConfigDict, example_shape: tuple[int, ...], num_classes: int
) -> tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...]]:
    """The constructor of the model that config.model describes, and the shape of one input to it.

    Args:
      config: config.model.
      example_shape: shape of one example of the data set, without the batch axis.
      num_classes: number of classes.

    Raises:
      UserError: an unknown family or dtype; errors in the sizes are raised by the constructor.
    """
    if config.dtype not in DTYPES:
        raise choose_from("dtype", config.dtype, DTYPES)
    options = {
        "alpha_init": config.alpha_init,
        "scan": config.scan,
        "remat": config.remat,
        "dtype": DTYPES[config.dtype],
    }
    match config.name:
        case "mlp":
            input_shape = (math.prod(example_shape),)
            return lambda rngs: MLP(
                *input_shape,
                config.width,
                config.depth,
                num_classes,
                config.residual,
                weight_variance=config.weight_variance,
                **options,
                rngs=rngs,
            ), input_shape
        case "resnet":
            options |= {
                "width": config.width,
                "batch_norm": config.batch_norm,
                "in_channels": example_shape[-1],
            }
            make: Callable[..., nnx.Module]
            if config.family == "cifar":
                make, options["variant"] = ResNet.cifar, config.variant
            elif config.family == "preact":
                make, options["stem"] = ResNet.preact, config.stem
            else:
                raise choose_from("model.family", config.family, ("cifar", "preact"))
            return lambda rngs: make(
                config.depth, config.residual, num_classes, **options, rngs=rngs
            ), example_shape
    raise choose_from("model", config.name, ("mlp", "resnet"))
