"""From config.model to a model: the one place that knows the families by name."""

import math
from collections.abc import Callable
from functools import partial

from flax import nnx
from ml_collections import ConfigDict

from rezero_jax.errors import UserError, choose_from
from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet.model import ResNet
from rezero_jax.models.transformer.model import Transformer

NAMES = ("mlp", "resnet", "transformer")
DTYPES = ("bfloat16", "float32")


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
    _check(config)
    if config.name == "transformer":
        raise UserError(
            "model.name=transformer reads text, not images; set data.name to stdlib, text or "
            "enwik8, or choose the model mlp or resnet"
        )
    if config.name == "mlp":
        in_features = math.prod(example_shape)
        return partial(MLP.from_config, config, in_features, num_classes), (in_features,)
    return partial(ResNet.from_config, config, example_shape[-1], num_classes), example_shape


def make_language_model(config: ConfigDict) -> Callable[[nnx.Rngs], Transformer]:
    """The constructor of the language model that config.model describes.

    Raises:
      UserError: it is no language model, or an unknown dtype; errors in the sizes are raised by
        the constructor.
    """
    _check(config)
    if config.name != "transformer":
        raise UserError(
            f"model.name={config.name} reads images, not text; set it to transformer, or choose "
            "other data"
        )
    return partial(Transformer.from_config, config)


def _check(config: ConfigDict) -> None:
    if config.name not in NAMES:
        raise choose_from("model", config.name, NAMES)
    if config.dtype not in DTYPES:
        raise choose_from("dtype", config.dtype, DTYPES)
