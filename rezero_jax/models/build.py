"""From config.model to a model: the one place that knows the families by name.

A model or a residual rule may also be the user's own, "module:name".
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from rezero_jax.devices import compute_dtype
from rezero_jax.errors import UserError, check_choice, choose_from
from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet.model import ResNet
from rezero_jax.models.transformer.config import TransformerConfig
from rezero_jax.models.transformer.model import Transformer
from rezero_jax.models.vit import ViT
from rezero_jax.residual import Rule, RuleConfig
from rezero_jax.user_code import check_call, find, is_own

NAMES = ("mlp", "resnet", "transformer", "vit")
DTYPES = ("auto", "bfloat16", "float32")
LARGEST = 10_000_000  # of every size in config.model
DEEPEST_UNROLLED = 10_000  # layers, each of which is made and compiled by itself


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

    `config` is config.model, or the same as a dict; `example_shape` has no batch axis. Raises a
    UserError for an unknown model or dtype, or a language model; the constructor checks the rest.
    """
    name, options = _options(config)
    if is_own(name):
        options |= {"example_shape": example_shape, "num_classes": num_classes}
        return _own_model(name, options), example_shape
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
            raise UserError(f"a ViT takes square images, not {height} x {width}; choose other data")
        return lambda rngs: ViT(height, **options, rngs=rngs), example_shape
    families: dict[str, Callable[..., ResNet]] = {"cifar": ResNet.cifar, "preact": ResNet.preact}
    family = options.pop("family")
    check_choice("model.family", family, families)
    options.pop("stem" if family == "cifar" else "variant", None)  # of the other family
    return lambda rngs: families[family](**options, rngs=rngs), example_shape


def make_language_model(config: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    """The constructor of the language model that config.model, or the same as a dict, describes.

    Raises a UserError for an unknown model or dtype, or a classifier; the model checks the rest.
    """
    name, options = _options(config)
    if is_own(name):
        return _own_model(name, options)
    if name != "transformer":
        raise UserError(f"model.name={name} reads images, not text; choose transformer, or images")
    return lambda rngs: Transformer(**options, rngs=rngs)


def rule_named(name: str) -> type[Rule]:
    """The residual rule of a name of the package, or the user's own of a name "module:name".

    Raises a UserError if there is no such rule, or its signature is not that of `Rule`.
    """
    if not is_own(name):
        return RuleConfig(name).rule
    what, rule = f"model.residual={name!r}", find("model.residual", name)
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise UserError(f"{what} is no subclass of rezero_jax.residual.Rule; make it one")
    check_call(what, rule, "config", "features", "place", "rngs")
    check_call(f"{what}.__call__", rule.__call__, "self", "x", "f")
    return rule


def _own_model(name: str, arguments: dict[str, Any]) -> Callable[[nnx.Rngs], nnx.Module]:
    what, make = f"model.name={name!r}", find("model.name", name)
    # As in the config, also where it was read from JSON.
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
    check_call(what, make, **arguments, rngs=None)

    def construct(rngs: nnx.Rngs) -> nnx.Module:
        model = make(**arguments, rngs=rngs)
        if not isinstance(model, nnx.Module):
            kind = type(model).__name__
            raise UserError(f"{what} made a {kind}; it must return a flax.nnx.Module")
        return model

    return construct


def _options(config: Any) -> tuple[str, dict[str, Any]]:
    """The model's name, and the arguments of its constructor."""
    options = dict(config)
    name, dtype, rule = options.pop("name", None), options.get("dtype"), options.get("residual")
    if name not in NAMES and not is_own(name):
        raise choose_from("model", name, NAMES)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
        options["dtype"] = getattr(jnp, compute_dtype(dtype))
    if isinstance(rule, type):
        text = f"{rule.__module__}:{rule.__name__}"
        raise UserError(f"model.residual is a class, which no file can hold; name it {text!r}")
    if is_own(rule):
        options["residual"] = rule_named(str(rule))
    check_options(options)
    return name, options


def check_options(options: Mapping[str, Any]) -> None:
    """Raises a UserError for a number that is too large in any model; a model checks the rest."""
    for key, value in options.items():
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise UserError(f"model.{key}={value} is too large; give at most {LARGEST}")
    if not options.get("scan") and (depth := options.get("depth", 1)) > DEEPEST_UNROLLED:
        raise UserError(f"model.depth={depth} is over {DEEPEST_UNROLLED}; set model.scan=True")
