"""ReZero in JAX and Flax: very deep residual networks whose branches are gated by alpha = 0."""

from rezero_jax.models.mlp import MLP
from rezero_jax.models.resnet import ResNet
from rezero_jax.residual import Alpha, ReZero
from rezero_jax.stack import Stack

__all__ = ["MLP", "Alpha", "ReZero", "ResNet", "Stack"]
__version__ = "0.1.0"
