"""A residual rule, a model and an objective of your own, and a config that names them.

python train.py --config=docs/examples/mine.py --workdir=runs/mine
"""

import math

import jax.numpy as jnp
import optax
from flax import nnx

from rezero_jax import Stack
from rezero_jax.config import base_config
from rezero_jax.residual import Alpha, Rule, make_rule


class TanhGate(Rule):
    """x' = x + tanh(alpha) F(x)."""

    shares_gate = True  # A Transformer's sublayers may share it.

    def __init__(self, config, features, place, rngs):
        self.alpha = Alpha(jnp.zeros(()))

    def __call__(self, x, f):
        return x + jnp.tanh(self.alpha[...]) * f(x)


class Block(nnx.Module):
    """One hidden layer, joined to the trunk by the rule."""

    def __init__(self, width, dropout, residual, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)  # Its random numbers come with each call.
        self.rule = make_rule(residual, width, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.rule(x, lambda x: self.dropout(nnx.relu(self.linear(x)), rngs=rngs))


class Net(nnx.Module):
    """A deep network on flattened images."""

    def __init__(self, width, depth, dropout, residual, example_shape, num_classes, *, rngs):
        self.stem = nnx.Linear(math.prod(example_shape), width, rngs=rngs)
        self.trunk = Stack(
            lambda rngs: Block(width, dropout, residual, rngs=rngs), depth, rngs=rngs
        )
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images, rngs=None):
        x = self.stem(images.reshape(len(images), -1))
        return self.head(self.trunk(x, rngs=rngs))


def smoothed(model, batch, key):
    """Cross entropy with label smoothing."""
    logits = model(batch["image"], rngs=nnx.Rngs(dropout=key))
    targets = optax.smooth_labels(nnx.one_hot(batch["label"], logits.shape[-1]), 0.1)
    hits = logits.argmax(axis=-1) == batch["label"]
    return {"loss": optax.softmax_cross_entropy(logits, targets), "accuracy": hits}


def get_config(arg=""):
    """The config; train.py sets fields by --config.KEY=VALUE."""
    config = base_config()
    config.model.name = "mine:Net"
    config.model.residual = "mine:TanhGate"
    config.model.width = 32
    config.model.depth = 16
    config.model.dropout = 0.1
    config.train.objective = "mine:smoothed"
    config.train.epochs = 20.0
    return config
