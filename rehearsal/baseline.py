"""Baseline networks in idiomatic Flax NNX.

The networks follow NNX's documentation: ReZero networks of `nnx` layers at their defaults, with
parameters stacked by `nnx.vmap` and run by `nnx.scan` (a ResNet's blocks are in a list). Sizes,
dtype, rematerialisation and the number of parameters are those of our config. As in ours, attention
draws a dropout mask for each head and example (`broadcast_dropout=False`, not the default).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from rezero_jax.devices import compute_dtype


class Hidden(nnx.Module):
    """x + alpha relu(W x + b)."""

    def __init__(self, width: int, dtype: Any, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.alpha = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Array) -> Array:
        return x + self.alpha.astype(x.dtype) * nnx.relu(self.linear(x))


class Layer(nnx.Module):
    """x + alpha attention(x), then x + alpha feedforward(x), with one alpha."""

    def __init__(self, model: ConfigDict, dtype: Any, *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(
            model.heads,
            model.width,
            num_kv_heads=model.kv_heads,
            use_bias=model.bias,
            dropout_rate=model.dropout,
            broadcast_dropout=False,
            deterministic=False,
            decode=False,
            dtype=dtype,
            rngs=rngs,
        )
        hidden = model.feedforward or 4 * model.width
        linear = partial(nnx.Linear, use_bias=model.bias, dtype=dtype, rngs=rngs)
        self.up, self.down = linear(model.width, hidden), linear(hidden, model.width)
        self.dropout = nnx.Dropout(model.dropout, rngs=rngs)
        gelu = partial(nnx.gelu, approximate=False)
        self.activation = gelu if model.activation == "gelu" else nnx.relu
        self.alpha = nnx.Param(jnp.zeros(()))

    def feedforward(self, x: Array) -> Array:
        return self.down(self.dropout(self.activation(self.up(x))))

    def __call__(self, x: Array) -> Array:
        alpha = self.alpha.astype(x.dtype)
        x = x + alpha * self.dropout(self.attention(x, is_causal=True))
        return x + alpha * self.dropout(self.feedforward(x))


class Stack(nnx.Module):
    """`depth` equal blocks, scanned over; `remat` rematerialises each in the backward pass."""

    def __init__(self, make: Callable[..., nnx.Module], depth: int, remat: bool, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> nnx.Module:
            return make(rngs=rngs)

        self.blocks = stacked(rngs)
        self.remat = remat

    def __call__(self, x: Array) -> Array:
        def apply(block: Any, x: Array) -> Array:
            return block(x)

        if self.remat:
            apply = nnx.remat(apply, prevent_cse=False)
        return nnx.scan(apply, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


class MLP(nnx.Module):
    """Fully connected; maps images (batch, ...) to float32 logits."""

    def __init__(self, model: ConfigDict, in_features: int, classes: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute_dtype(model.dtype))
        self.stem = nnx.Linear(in_features, model.width, dtype=dtype, rngs=rngs)
        make = partial(Hidden, model.width, dtype)
        self.trunk = Stack(make, model.depth, model.remat != "none", rngs)
        self.head = nnx.Linear(model.width, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.stem(x.reshape(x.shape[0], -1)))
        return self.head(self.trunk(x).astype(jnp.float32))


class Transformer(nnx.Module):
    """Decoder-only; maps (batch, length) tokens to float32 logits (batch, length, vocabulary)."""

    def __init__(self, model: ConfigDict, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute_dtype(model.dtype))
        self.embedding = nnx.Embed(model.vocab_size, model.width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(model.dropout, rngs=rngs)
        make = partial(Layer, model, dtype)
        self.trunk = Stack(make, model.depth, model.remat != "none", rngs)
        self.norm = (
            nnx.LayerNorm(model.width, dtype=dtype, rngs=rngs) if model.final_norm else nnx.identity
        )
        self.head = nnx.Linear(
            model.width, model.vocab_size, use_bias=model.bias, dtype=dtype, rngs=rngs
        )

    def __call__(self, tokens: Array) -> Array:
        x = self.embedding(tokens)
        length, width = x.shape[1:]
        x = x * width**0.5 + jnp.asarray(sinusoids(length, width), x.dtype)[None]
        return self.head(self.norm(self.trunk(self.dropout(x)))).astype(jnp.float32)


def sinusoids(length: int, width: int) -> np.ndarray:
    """sin and cos of position * 10000^(-2 i / width), (length, width)."""
    angle = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, width)


class Block(nnx.Module):
    """s(x) + alpha relu(bn conv relu bn conv x); s(x) is x, subsampled and widened by zeros."""

    def __init__(self, cin: int, cout: int, dtype: Any, *, rngs: nnx.Rngs):
        self.stride, self.more = (1 if cin == cout else 2), cout - cin
        conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        norm = partial(nnx.BatchNorm, momentum=0.9, dtype=dtype, rngs=rngs)
        self.conv1, self.norm1 = conv(cin, cout, strides=self.stride), norm(cout)
        self.conv2, self.norm2 = conv(cout, cout), norm(cout)
        self.shortcut_norm = norm(cin) if self.more else nnx.identity
        self.alpha = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        x = self.shortcut_norm(x[:, :: self.stride, :: self.stride])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.more)))
        return x + self.alpha.astype(x.dtype) * y


class ResNet(nnx.Module):
    """CIFAR network of 6n + 2 layers; maps (batch, height, width, channels) to float32 logits."""

    def __init__(self, model: ConfigDict, channels: int, classes: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute_dtype(model.dtype))
        self.conv = nnx.Conv(channels, model.width, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(model.width, momentum=0.9, dtype=dtype, rngs=rngs)
        widths = [model.width * 2**stage for stage in range(3)]
        outs = [width for width in widths for _ in range((model.depth - 2) // 6)]
        pairs = zip([model.width, *outs], outs, strict=False)
        self.blocks = nnx.List(Block(cin, cout, dtype, rngs=rngs) for cin, cout in pairs)
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.astype(jnp.float32).mean(axis=(1, 2)))


def make_model(model: ConfigDict, example: tuple[int, ...], classes: int, seed: int) -> nnx.Module:
    """Makes the baseline of our model.

    Args:
      model: config.model.
      example: shape of an image (height, width, channels); language models ignore it.
      classes: number of classes; language models ignore it.

    Raises:
      NotImplementedError: the model has no baseline.
    """
    cifar = model.name != "resnet" or (model.family == "cifar" and model.variant == "paper")
    plain = model.name != "transformer" or (
        model.positions == "sinusoidal" and model.alpha_per == "layer" and not model.tied
    )
    known = model.name in ("transformer", "mlp", "resnet")
    if not known or model.residual != "rezero" or not cifar or not plain:
        raise NotImplementedError("only some ReZero networks have a baseline")
    rngs = nnx.Rngs(seed)
    if model.name == "transformer":
        return Transformer(model, rngs=rngs)
    if model.name == "mlp":
        return MLP(model, int(np.prod(example)), classes, rngs=rngs)
    return ResNet(model, example[-1], classes, rngs=rngs)
