"""From config.model to a model: the one place that knows the families by name."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from rezero_jax.errors import UserError, choose_from
from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet.model import ResNet
from rezero_jax.models.transformer.model import Transformer

NAMES = ("mlp", "resnet", "transformer")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_model(
    config: ConfigDict, example_shape: tuple[int, ...], num_classes: int
) -> tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...]]:
    """The constructor of the classifier that config.model describes, and the shape of its input.

    Args:
      config: config.model.
      example_shape: shape of one example of the data set, without the batch axis.
      num_classes: number of classes.

    Raises:
      UserError: an unknown family or dtype; errors in the sizes are raised by the constructor.
    """
    options = _options(config)
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
        case "transformer":
            raise UserError(
                "model.name=transformer reads text, not images; set data.name to stdlib, text or "
                "enwik8, or choose the model mlp or resnet"
            )
    raise choose_from("model", config.name, NAMES)


def make_language_model(config: ConfigDict) -> Callable[[nnx.Rngs], Transformer]:
    """The constructor of the language model that config.model describes.

    Raises:
      UserError: it is no language model, or an unknown dtype; errors in the sizes are raised by
        the constructor.
    """
    if config.name in NAMES and config.name != "transformer":
        raise UserError(
            f"model.name={config.name} reads images, not text; set it to transformer, or choose "
            "other data"
        )
    if config.name != "transformer":
        raise choose_from("model", config.name, NAMES)
    options = _options(config)
    return lambda rngs: Transformer(
        config.vocab_size,
        config.width,
        config.depth,
        config.heads,
        config.max_len,
        config.residual,
        feedforward=config.feedforward,
        kv_heads=config.kv_heads,
        positions=config.positions,
        tied=config.tied,
        final_norm=config.final_norm,
        activation=config.activation,
        dropout=config.dropout,
        bias=config.bias,
        alpha_per=config.alpha_per,
        **options,
        rngs=rngs,
    )


def _options(config: ConfigDict) -> dict[str, Any]:
    """What every family has."""
    if config.dtype not in DTYPES:
        raise choose_from("dtype", config.dtype, DTYPES)
    return {
        "alpha_init": config.alpha_init,
        "scan": config.scan,
        "remat": config.remat,
        "dtype": DTYPES[config.dtype],
    }
