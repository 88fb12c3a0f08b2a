"""Blocks of residual networks on images.

The table lists the equation of a block under each residual rule. s(x) is the shortcut: x itself
or, in a block that changes the shape of its input, the output of `Shortcut` or of a 1x1
convolution. A post-activation block (He et al., arXiv 1512.03385) has a ReLU after its
convolutions; a pre-activation block (arXiv 1603.05027) has it before them.

    rule         post: F = bn conv relu bn conv x         pre: F = conv relu bn conv relu bn x

    residual     x' = relu(s(x) + F(x))                   x' = s(x) + F(x)
    zero_gamma   same; the last bn's scale starts at 0    (none)
    gated        x' = (1 - a) s(x) + a relu(F(x))         x' = (1 - a) s(x) + a F(x)
    skipinit     x' = relu(s(x) + a F(x)), F without bn   x' = s(x) + a F(x), F without bn
    rezero       x' = s(x) + a relu(F(x))                 x' = s(x) + a F(x)
    rezero_channel: as rezero, with one a per channel
    a subclass of Rule: x' = rule(s(x), relu(F(x)))       x' = rule(s(x), F(x))
    fixup        scalar biases and a multiplier instead of bn: see `PostFixup` and `PreFixup`

The gate a is a scalar that starts at 0. The paper reports `residual` and `rezero` for both columns,
and `zero_gamma`, `gated` and `fixup` (Zhang et al., arXiv 1901.09321) for the first. It discusses
`skipinit` (arXiv 2002.10444) without numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from rezero_jax.models import init
from rezero_jax.models.resnet.config import ResNetConfig
from rezero_jax.models.resnet.conv import Images

ZEROS = nnx.initializers.zeros_init()


class Shortcut(nnx.Module):
    """s(x) of a post-activation block that changes shape: subsampled x, padded with zero channels.

    The paper's variant applies a BatchNorm to the subsampled pixels.
    """

    def __init__(self, config: ResNetConfig, cin: int, cout: int, stride: int):
        self.norm = config.norm(cin) if config.variant == "paper" else init.identity
        self.stride, self.added = stride, cout - cin

    def __call__(self, x: Images) -> Images:
        x = self.norm(x[:, :: self.stride, :: self.stride])
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.added)))


class PostBlock(nnx.Module):
    """A post-activation block of the table above, with 3x3 convolutions."""

    def __init__(self, config: ResNetConfig, cin: int, channels: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = config.conv(cin, channels, 3, stride, rngs=rngs)
        self.norm1 = config.norm(channels)
        self.conv2 = config.conv(channels, channels, 3, rngs=rngs)
        self.norm2 = config.norm(channels, 0.0 if config.residual == "zero_gamma" else 1.0)
        changes = config.changes_shape(cin, channels, stride)
        self.shortcut = Shortcut(config, cin, channels, stride) if changes else init.identity
        self.rule = config.rule(channels, rngs)
        gated = ("rezero", "rezero_channel", "gated")
        self.relu_in_branch = config.residual in gated or isinstance(config.residual, type)

    def branch(self, x: Images) -> Images:
        """F(x)."""
        return self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))

    def __call__(self, x: Images) -> Images:
        s = self.shortcut(x)
        if self.relu_in_branch:
            return self.rule(s, lambda _: nnx.relu(self.branch(x)))
        return nnx.relu(self.rule(s, lambda _: self.branch(x)))


class PreBlock(nnx.Module):
    """A pre-activation block of the table above: F(x) = conv relu bn conv u, u = relu(bn x).

    The convolutions are 3x3; a bottleneck block has three, 1x1, 3x3 and 1x1. In a block that
    changes the shape, s(x) is a 1x1 convolution of u.
    """

    def __init__(self, config: ResNetConfig, cin: int, channels: int, stride: int, rngs: nnx.Rngs):
        conv, out = partial(config.conv, rngs=rngs), channels * config.expansion
        bottleneck = config.expansion > 1
        self.norm1 = config.norm(cin)
        changes = config.changes_shape(cin, channels, stride)
        self.shortcut = conv(cin, out, 1, stride) if changes else None
        self.conv1 = conv(cin, channels, 1) if bottleneck else conv(cin, channels, 3, stride)
        self.norm2 = config.norm(channels)
        self.conv2 = conv(channels, channels, 3, stride if bottleneck else 1)
        self.norm3 = config.norm(channels) if bottleneck else init.identity
        self.conv3 = conv(channels, out, 1) if bottleneck else None
        self.rule = config.rule(out, rngs)

    def branch(self, u: Images) -> Images:
        """F as a function of u."""
        f = self.conv2(nnx.relu(self.norm2(self.conv1(u))))
        return f if self.conv3 is None else self.conv3(nnx.relu(self.norm3(f)))

    def __call__(self, x: Images) -> Images:
        u = nnx.relu(self.norm1(x))
        s = x if self.shortcut is None else self.shortcut(u).astype(x.dtype)
        return self.rule(s, lambda _: self.branch(u))


class PostFixup(nnx.Module):
    """x' = relu(s(x) + c conv(relu(conv(x + b1a) + b1b) + b2a) + b2b); initially b = 0 and c = 1.

    The first convolution starts as Kaiming normal (fan out) times blocks^(-1/2), the second at
    zero. A shortcut that subsamples takes x + b1a.
    """

    def __init__(self, config: ResNetConfig, cin: int, channels: int, stride: int, rngs: nnx.Rngs):
        first = fixup_init(config, 2)
        self.conv1 = config.conv(cin, channels, 3, stride, kernel_init=first, rngs=rngs)
        self.conv2 = config.conv(channels, channels, 3, kernel_init=ZEROS, rngs=rngs)
        changes = config.changes_shape(cin, channels, stride)
        self.shortcut = Shortcut(config, cin, channels, stride) if changes else None
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (scalar(0.0) for _ in range(4))
        self.scale = scalar(1.0)

    def __call__(self, x: Images) -> Images:
        u = x + self.bias1a
        f = self.conv2(nnx.relu(self.conv1(u) + self.bias1b) + self.bias2a)
        s = x if self.shortcut is None else self.shortcut(u)
        return nnx.relu(s + (f * self.scale + self.bias2b))


class PreFixup(nnx.Module):
    """x' = s(x) + c conv(relu(conv(u) + b2a) + b2b) + b2c, where u = relu(x + b1a) + b1b.

    This applies Fixup's rules to a pre-activation block: a scalar bias before each convolution and
    each ReLU, a multiplier c = 1, the last convolution 0, the others scaled by blocks^(-1/2). In a
    bottleneck block, relu(conv(...) + b3a) + b3b precedes a third convolution, and the first two
    are scaled by blocks^(-1/4).
    """

    def __init__(self, config: ResNetConfig, cin: int, channels: int, stride: int, rngs: nnx.Rngs):
        conv, out = partial(config.conv, rngs=rngs), channels * config.expansion
        if config.expansion > 1:
            small = fixup_init(config, 3)
            self.conv1 = conv(cin, channels, 1, kernel_init=small)
            self.conv2 = conv(channels, channels, 3, stride, kernel_init=small)
            self.conv3: nnx.Conv | None = conv(channels, out, 1, kernel_init=ZEROS)
            self.bias3a, self.bias3b, self.bias3c = (scalar(0.0) for _ in range(3))
        else:
            self.conv1 = conv(cin, channels, 3, stride, kernel_init=fixup_init(config, 2))
            self.conv2 = conv(channels, channels, 3, kernel_init=ZEROS)
            self.conv3 = None
            self.bias2c = scalar(0.0)
        changes = config.changes_shape(cin, channels, stride)
        self.shortcut = conv(cin, out, 1, stride) if changes else None
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (scalar(0.0) for _ in range(4))
        self.scale = scalar(1.0)

    def __call__(self, x: Images) -> Images:
        u = nnx.relu(x + self.bias1a) + self.bias1b
        s = x if self.shortcut is None else self.shortcut(u)
        f = self.conv2(nnx.relu(self.conv1(u) + self.bias2a) + self.bias2b)
        if self.conv3 is None:
            return s + (f * self.scale + self.bias2c)
        f = self.conv3(nnx.relu(f + self.bias3a) + self.bias3b)
        return s + (f * self.scale + self.bias3c)


def fixup_init(config: ResNetConfig, layers: int) -> Initializer:
    """Kaiming normal (fan out) times blocks^(-1 / (2 layers - 2)): Fixup's rule 2."""
    return init.kaiming_normal("fan_out", sum(config.stages) ** (-1.0 / (2 * layers - 2)))


def scalar(value: float) -> nnx.Param:
    """A trainable float32 scalar: a bias or multiplier of Fixup."""
    return nnx.Param(jnp.full((), value, jnp.float32))


BLOCKS: dict[str, tuple[Callable[..., Any], ...]] = {  # {family: (without Fixup, with Fixup)}
    "cifar": (PostBlock, PostFixup),
    "preact": (PreBlock, PreFixup),
}
