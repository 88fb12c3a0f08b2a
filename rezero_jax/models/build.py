"""From config.model to a model: the one place that knows the families by name."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from rezero_jax.devices import compute_dtype
from rezero_jax.errors import UserError, choose_from
from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet.model import ResNet
from rezero_jax.models.transformer.config import TransformerConfig
from rezero_jax.models.transformer.model import Transformer
from rezero_jax.models.vit import ViT

NAMES = ("mlp", "resnet", "transformer", "vit")
DTYPES = ("auto", "bfloat16", "float32")
LARGEST = 10_000_000  # of every size in config.model


def transformer_model() -> Any:
    """config.model of a byte-level language model, except depth, width, heads and max_len."""
    from rezero_jax.config import option_fields  # ml_collections, which models do without

    model = option_fields(TransformerConfig(activation="gelu"))
    model.name = "transformer"
    model.vocab_size = 256
    model.positions = "sinusoidal"  # sinusoidal, learned, rotary
    model.tied = False  # whether the head's weights are the embedding's
    model.final_norm = False
    model.scan = True
    model.remat = "none"
    model.dtype = "auto"  # float32, bfloat16, auto: bfloat16 on accelerators, float32 on a CPU
    return model


def make_model(
    config: Any, example_shape: tuple[int, ...], num_classes: int
) -> tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...]]:
    """The constructor of the classifier that config.model describes, and the shape of its input.

    Args:
      config: config.model, or the same as a dict.
      example_shape: shape of one example of the data set, without the batch axis.
      num_classes: number of classes.

    Raises:
      UserError: an unknown model or dtype, or a language model; the constructor checks the rest.
    """
    name, options = _options(config)
    if name == "transformer":
        raise UserError(
            "model.name=transformer reads text, not images; set data.name to stdlib, text or "
            "enwik8, or choose the model mlp, resnet or vit"
        )
    if name == "mlp":
        size = math.prod(example_shape)
        return lambda rngs: MLP(size, out_features=num_classes, **options, rngs=rngs), (size,)
    height, width, channels = example_shape
    options |= {"in_channels": channels, "num_classes": num_classes}
    if name == "vit":
        if height != width:
            raise UserError(
                f"model.name=vit takes square images, not {height} x {width}; choose other data"
            )
        return lambda rngs: ViT(height, **options, rngs=rngs), example_shape
    families: dict[str, Callable[..., ResNet]] = {"cifar": ResNet.cifar, "preact": ResNet.preact}
    family = options.pop("family")
    if family not in families:
        raise choose_from("model.family", family, families)
    options.pop("stem" if family == "cifar" else "variant", None)  # of the other family
    return lambda rngs: families[family](**options, rngs=rngs), example_shape


def make_language_model(config: Any) -> Callable[[nnx.Rngs], Transformer]:
    """The constructor of the language model that config.model, or the same as a dict, describes.

    Raises:
      UserError: an unknown model or dtype, or a classifier; the constructor checks the rest.
    """
    name, options = _options(config)
    if name != "transformer":
        raise UserError(
            f"model.name={name} reads images, not text; set it to transformer, or choose other data"
        )
    return lambda rngs: Transformer(**options, rngs=rngs)


def _options(config: Any) -> tuple[str, dict[str, Any]]:
    """The model's name, and the arguments of its constructor."""
    options = dict(config)
    name, dtype = options.pop("name"), options["dtype"]
    if name not in NAMES:
        raise choose_from("model", name, NAMES)
    if dtype not in DTYPES:
        raise choose_from("dtype", dtype, DTYPES)
    for key, value in options.items():
        if isinstance(value, int) and value > LARGEST:
            raise UserError(f"model.{key}={value} is too large; give at most {LARGEST}")
    return name, options | {"dtype": getattr(jnp, compute_dtype(dtype))}
