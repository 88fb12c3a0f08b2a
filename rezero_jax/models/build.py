"""From config.model to a model: the one place that knows the families by name."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from rezero_jax.devices import compute_dtype
from rezero_jax.errors import UserError, choose_from
from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet.model import ResNet
from rezero_jax.models.transformer.model import Transformer
from rezero_jax.models.vit import ViT

NAMES = ("mlp", "resnet", "transformer", "vit")
DTYPES = ("auto", "bfloat16", "float32")
LARGEST = 10_000_000  # of every size in config.model


def make_model(
    config: Any, example_shape: tuple[int, ...], num_classes: int
) -> tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...]]:
    """The constructor of the classifier that config.model describes, and the shape of its input.

    Args:
      config: config.model, or the same as a dict.
      example_shape: shape of one example of the data set, without the batch axis.
      num_classes: number of classes.

    Raises:
      UserError: an unknown model, family or dtype, or a language model; the constructor checks the
        sizes.
    """
    _check(config)
    if config["name"] == "transformer":
        raise UserError(
            "model.name=transformer reads text, not images; set data.name to stdlib, text or "
            "enwik8, or choose the model mlp, resnet or vit"
        )
    if config["name"] == "vit":
        return _vit(config, example_shape, num_classes), example_shape
    fields = ("width", "depth", "residual", "alpha_init", "norm", "base_depth", "scan", "remat")
    options = {name: config[name] for name in fields if name in config} | {
        "dtype": getattr(jnp, compute_dtype(config["dtype"]))
    }
    make: Callable[..., nnx.Module]
    if config["name"] == "mlp":
        example_shape = (math.prod(example_shape),)
        make = partial(MLP, example_shape[0], out_features=num_classes)
        options["weight_variance"] = config["weight_variance"]
    else:
        options |= {"in_channels": example_shape[-1], "batch_norm": config["batch_norm"]}
        if config["family"] == "cifar":
            make = partial(ResNet.cifar, num_classes=num_classes, variant=config["variant"])
        elif config["family"] == "preact":
            make = partial(ResNet.preact, num_classes=num_classes, stem=config["stem"])
        else:
            raise choose_from("model.family", config["family"], ("cifar", "preact"))
    return lambda rngs: make(**options, rngs=rngs), example_shape


def make_language_model(config: Any) -> Callable[[nnx.Rngs], Transformer]:
    """The constructor of the language model that config.model, or the same as a dict, describes.

    Raises:
      UserError: an unknown model or dtype, or a classifier; the constructor checks the sizes.
    """
    _check(config)
    if config["name"] != "transformer":
        raise UserError(
            f"model.name={config['name']} reads images, not text; set it to transformer, or choose "
            "other data"
        )
    return partial(Transformer.from_config, config)


def _vit(
    config: Any, example_shape: tuple[int, ...], num_classes: int
) -> Callable[[nnx.Rngs], ViT]:
    height, width, channels = example_shape
    if height != width:
        raise UserError(
            f"model.name=vit takes square images, not {height} x {width}; choose other data"
        )
    options = {key: value for key, value in config.items() if key not in ("name", "dtype")}
    options |= {"image_size": height, "in_channels": channels, "num_classes": num_classes}
    dtype = getattr(jnp, compute_dtype(config["dtype"]))
    return lambda rngs: ViT(**options, dtype=dtype, rngs=rngs)


def _check(config: Any) -> None:
    if config["name"] not in NAMES:
        raise choose_from("model", config["name"], NAMES)
    if config["dtype"] not in DTYPES:
        raise choose_from("dtype", config["dtype"], DTYPES)
    for name, value in config.items():
        if isinstance(value, int) and value > LARGEST:
            raise UserError(f"model.{name}={value} is too large; give at most {LARGEST}")
