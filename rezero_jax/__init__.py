"""ReZero in JAX and Flax: very deep residual networks whose branches are gated by alpha = 0."""

from rezero_jax.models.adaln import AdaLNZero
from rezero_jax.models.exported import load
from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet.model import ResNet
from rezero_jax.models.transformer.encoder import Decoder, Encoder
from rezero_jax.models.transformer.layer import DecoderLayer, EncoderLayer
from rezero_jax.models.transformer.model import Transformer
from rezero_jax.models.vit import ViT
from rezero_jax.residual import Alpha, ReZero
from rezero_jax.stack import Stack

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
