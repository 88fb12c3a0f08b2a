"""ReZero in JAX and Flax: very deep residual networks whose branches are gated by alpha = 0."""

from typing import TYPE_CHECKING, Any

from rezero_jax.models.adaln import AdaLNZero
from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet.model import ResNet
from rezero_jax.models.transformer.layer import Decoder, DecoderLayer, Encoder, EncoderLayer
from rezero_jax.models.transformer.model import Transformer
from rezero_jax.models.vit import ViT
from rezero_jax.residual import Alpha, ReZero
from rezero_jax.stack import Stack

if TYPE_CHECKING:
    from rezero_jax.export import load

__all__ = [
    "MLP",
    "AdaLNZero",
    "Alpha",
    "Decoder",
    "DecoderLayer",
    "Encoder",
    "EncoderLayer",
    "ReZero",
    "ResNet",
    "Stack",
    "Transformer",
    "ViT",
    "load",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on demand, because `python -m rezero_jax.export` would import its module twice.
    if name == "load":
        from rezero_jax.export import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
