"""Blocks of residual networks on images, and the options they are made from.

This table has the equation of a block under each residual rule. s(x) is the shortcut: x itself,
or, where a block changes the shape of its input, the output of `Shortcut` or of a 1x1 convolution.
Only `gated` scales s(x). A post-activation block (He et al., arXiv 1512.03385) has a ReLU after its
convolutions, a pre-activation block (arXiv 1603.05027) before them.

    rule         post: F = bn conv relu bn conv x         pre: F = conv relu bn conv relu bn x

    residual     x' = relu(s(x) + F(x))                   x' = s(x) + F(x)
    zero_gamma   same; the last bn's scale starts at 0    (none)
    gated        x' = (1 - a) s(x) + a relu(F(x))         x' = (1 - a) s(x) + a F(x)
    skipinit     x' = relu(s(x) + a F(x)), F without bn   x' = s(x) + a F(x), F without bn
    rezero       x' = s(x) + a relu(F(x))                 x' = s(x) + a F(x)
    rezero_channel: as rezero, with one a per channel
    fixup        scalar biases and a multiplier instead of bn: see `PostFixup` and `PreFixup`

The gate a is a scalar that starts at 0. The paper's table has `residual` and `rezero` of both
columns, and `zero_gamma`, `gated` and `fixup` of the first, computed as in the code behind it. The
paper discusses `skipinit` (arXiv 2002.10444) without numbers. Fixup is by Zhang et al., arXiv
1901.09321; the paper's table uses their code for CIFAR-10.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from rezero_jax.errors import UserError, choose_from
from rezero_jax.models import init
from rezero_jax.models.resnet.batch_norm import BatchNorm
from rezero_jax.models.resnet.conv import Conv, Images
from rezero_jax.residual import Rule, RuleConfig, make_rule

RULES = ("residual", "zero_gamma", "gated", "fixup", "skipinit", "rezero", "rezero_channel")
PREACT_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
ZEROS = nnx.initializers.zeros_init()


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Options of a residual network, passed whole to its stages and blocks.

    Attributes:
      family: "cifar" (three stages of post-activation blocks) or "preact" (four stages of
        pre-activation blocks).
      depth: cifar: 6n + 2 for n blocks in each stage, such as 20, 32, 44, 56 or 110; preact: 18 or
        34 (two 3x3 convolutions in each block), or 50 (bottleneck blocks).
      residual: one of RULES; there is no `zero_gamma` in the preact family.
      num_classes: number of logits.
      width: channels of the first stage; each later stage has twice as many.
      in_channels: 3 for colour images, 1 for grey images.
      variant: of the cifar family. "paper", the code behind the paper's table, has a BatchNorm in
        each shortcut that subsamples, and Kaiming normal convolutions by fan out (PyTorch's default
        for `gated` and for the stem of `fixup`). "notebook", the authors' notebook, has no such
        BatchNorm, and Kaiming normal weights by fan in, including the head's.
      stem: of the preact family, whose weights have PyTorch's default distribution. "cifar" keeps
        the resolution; "imagenet" divides it by four, for large images.
      batch_norm: False removes every BatchNorm, as `fixup` and `skipinit` always do; convolutions
        then have biases.
      alpha_init: initial gate, where the rule has one; None is 0.
      scan, remat: how the equal blocks of a stage run, see `rezero_jax.stack.Stack`. Scanned stages
        compile faster at great depth; a step takes the same time (ResNet-20 on a CPU). A 3x3
        convolution is not a matrix product, so remat="dots" recomputes it.
      dtype: dtype of the computation; parameters, trunk and logits are float32.

    Raises:
      UserError: an unknown depth, rule, variant or stem, or a combination that cannot learn.
    """

    family: str
    depth: int
    residual: str
    num_classes: int
    width: int
    in_channels: int
    variant: str = "paper"
    stem: str = "cifar"
    batch_norm: bool
    alpha_init: float | None
    scan: bool
    remat: str
    dtype: Any

    def __post_init__(self) -> None:
        for what, name, valid in (
            ("model.family", self.family, ("cifar", "preact")),
            ("residual rule", self.residual, RULES),
            ("variant", self.variant, ("paper", "notebook")),
            ("stem", self.stem, ("cifar", "imagenet")),
        ):
            if name not in valid:
                raise choose_from(what, name, valid)
        if self.num_classes < 1:
            raise UserError(f"num_classes is {self.num_classes}; give at least 1")
        if not self.is_post and self.depth not in PREACT_BLOCKS:
            raise choose_from("depth", self.depth, map(str, PREACT_BLOCKS))
        if self.is_post and (self.depth < 8 or (self.depth - 2) % 6):
            below = max(self.depth - (self.depth - 2) % 6, 8)
            raise UserError(
                f"depth={self.depth} is not 6n + 2; the closest depths are {below} and {below + 6}"
            )
        if self.residual == "zero_gamma" and not (self.batch_norm and self.is_post):
            raise UserError(
                "zero_gamma needs a BatchNorm at the end of each branch, which only ResNet.cifar "
                "with batch_norm=True has; change these or use rezero"
            )

    @property
    def is_post(self) -> bool:
        """Whether the network has post-activation blocks."""
        return self.family == "cifar"

    @property
    def stages(self) -> tuple[int, ...]:
        """Number of blocks in each stage."""
        return ((self.depth - 2) // 6,) * 3 if self.is_post else PREACT_BLOCKS[self.depth]

    @property
    def expansion(self) -> int:
        """Channels of the trunk over the inner channels of a block: 4 in bottleneck blocks."""
        return 4 if not self.is_post and self.depth == 50 else 1

    @property
    def has_norm(self) -> bool:
        """Whether the network has any BatchNorm."""
        return self.batch_norm and self.residual not in ("fixup", "skipinit")

    @property
    def kernel_init(self) -> Initializer | None:
        """Initial distribution of the convolutions, except in Fixup's branches; None: PyTorch's."""
        if not self.is_post:
            return None
        if self.variant == "notebook":
            return init.kaiming_normal("fan_in")
        return None if self.residual in ("gated", "fixup") else init.kaiming_normal("fan_out")

    def conv(self, cin: int, cout: int, kernel: int, stride: int = 1, **options: Any) -> Conv:
        """A convolution, with a bias where neither a BatchNorm nor Fixup's scalars provide one."""
        bias = not self.has_norm and self.residual != "fixup"
        options = {"kernel_init": self.kernel_init} | options
        return Conv(cin, cout, kernel, stride=stride, bias=bias, dtype=self.dtype, **options)

    def norm(self, features: int, scale_init: float = 1.0) -> Callable[[Array], Array]:
        """A BatchNorm, or the identity in a network without BatchNorm."""
        return BatchNorm(features, scale_init=scale_init) if self.has_norm else nnx.identity

    def rule(self, features: int, rngs: nnx.Rngs) -> Rule:
        """The rule that joins branch and shortcut, in every block without Fixup."""
        name = {"zero_gamma": "residual", "skipinit": "rezero"}.get(self.residual, self.residual)
        return make_rule(RuleConfig(name, self.alpha_init), features, rngs=rngs)


class Shortcut(nnx.Module):
    """s(x) of a post-activation block that changes shape: x subsampled, with zeros as new channels.

    The paper's variant normalises the subsampled pixels.
    """

    def __init__(self, config: ResNetConfig, cin: int, cout: int, stride: int):
        self.norm = config.norm(cin) if config.variant == "paper" else nnx.identity
        self.stride, self.added = stride, cout - cin

    def __call__(self, x: Images) -> Images:
        x = self.norm(x[:, :: self.stride, :: self.stride])
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.added)))


class PostBlock(nnx.Module):
    """F(x) = bn conv relu bn conv x with 3x3 convolutions, joined to s(x) as in the table above."""

    def __init__(
        self, config: ResNetConfig, cin: int, channels: int, stride: int, *, rngs: nnx.Rngs
    ):
        self.conv1 = config.conv(cin, channels, 3, stride, rngs=rngs)
        self.norm1 = config.norm(channels)
        self.conv2 = config.conv(channels, channels, 3, rngs=rngs)
        self.norm2 = config.norm(channels, 0.0 if config.residual == "zero_gamma" else 1.0)
        changes = stride != 1 or cin != channels
        self.shortcut = Shortcut(config, cin, channels, stride) if changes else nnx.identity
        self.rule = config.rule(channels, rngs)
        self.relu_in_branch = config.residual in ("rezero", "rezero_channel", "gated")

    def branch(self, x: Images) -> Images:
        """F(x)."""
        return self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))

    def __call__(self, x: Images) -> Images:
        s = self.shortcut(x)
        if self.relu_in_branch:
            return self.rule(s, lambda _: nnx.relu(self.branch(x)))
        return nnx.relu(self.rule(s, lambda _: self.branch(x)))


class PreBlock(nnx.Module):
    """With u = relu(bn x), F(x) = conv relu bn conv u, joined to s(x) as in the table above.

    The convolutions are 3x3; in a bottleneck block there are three, 1x1, 3x3 and 1x1. Where the
    shape changes, s(x) is a 1x1 convolution of u.
    """

    def __init__(
        self, config: ResNetConfig, cin: int, channels: int, stride: int, *, rngs: nnx.Rngs
    ):
        conv, out = partial(config.conv, rngs=rngs), channels * config.expansion
        bottleneck = config.expansion > 1
        self.norm1 = config.norm(cin)
        changes = stride != 1 or cin != out
        self.shortcut = conv(cin, out, 1, stride) if changes else None
        first = (1, 1) if bottleneck else (3, stride)
        self.conv1 = conv(cin, channels, *first)
        self.norm2 = config.norm(channels)
        self.conv2 = conv(channels, channels, 3, stride if bottleneck else 1)
        self.norm3 = config.norm(channels) if bottleneck else nnx.identity
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
    """x' = relu(s(x) + c conv(relu(conv(x + b1a) + b1b) + b2a) + b2b), at first b = 0 and c = 1.

    The first convolution starts at Kaiming's deviation (fan out) times blocks^(-1/2), the second
    at zero. A shortcut that subsamples takes x + b1a.
    """

    def __init__(
        self, config: ResNetConfig, cin: int, channels: int, stride: int, *, rngs: nnx.Rngs
    ):
        conv = partial(config.conv, rngs=rngs)
        self.conv1 = conv(cin, channels, 3, stride, kernel_init=fixup_init(config, 2))
        self.conv2 = conv(channels, channels, 3, kernel_init=ZEROS)
        changes = stride != 1 or cin != channels
        self.shortcut = Shortcut(config, cin, channels, stride) if changes else None
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (scalar(0.0) for _ in range(4))
        self.scale = scalar(1.0)

    def __call__(self, x: Images) -> Images:
        u = x + self.bias1a
        f = self.conv2(nnx.relu(self.conv1(u) + self.bias1b) + self.bias2a)
        s = x if self.shortcut is None else self.shortcut(u)
        return nnx.relu(s + (f * self.scale + self.bias2b))


class PreFixup(nnx.Module):
    """With u = relu(x + b1a) + b1b, x' = s(x) + c conv(relu(conv(u) + b2a) + b2b) + b2c.

    Fixup's rules applied to a pre-activation block: a scalar bias before each convolution and each
    ReLU, a multiplier c = 1, the last convolution 0, the others scaled by blocks^(-1/2). In a
    bottleneck block, relu(conv(...) + b3a) + b3b precedes a third convolution, and the others are
    scaled by blocks^(-1/4).
    """

    def __init__(
        self, config: ResNetConfig, cin: int, channels: int, stride: int, *, rngs: nnx.Rngs
    ):
        conv, out = partial(config.conv, rngs=rngs), channels * config.expansion
        bottleneck = config.expansion > 1
        small = fixup_init(config, 3 if bottleneck else 2)
        first = (1, 1) if bottleneck else (3, stride)
        self.conv1 = conv(cin, channels, *first, kernel_init=small)
        if bottleneck:
            self.conv2 = conv(channels, channels, 3, stride, kernel_init=small)
            self.conv3 = conv(channels, out, 1, kernel_init=ZEROS)
            self.bias3a, self.bias3b, self.bias3c = (scalar(0.0) for _ in range(3))
        else:
            self.conv2 = conv(channels, channels, 3, kernel_init=ZEROS)
            self.bias2c = scalar(0.0)
        changes = stride != 1 or cin != out
        self.shortcut = conv(cin, out, 1, stride) if changes else None
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (scalar(0.0) for _ in range(4))
        self.scale = scalar(1.0)
        self.bottleneck = bottleneck

    def __call__(self, x: Images) -> Images:
        u = nnx.relu(x + self.bias1a) + self.bias1b
        s = x if self.shortcut is None else self.shortcut(u)
        f = self.conv2(nnx.relu(self.conv1(u) + self.bias2a) + self.bias2b)
        if not self.bottleneck:
            return s + (f * self.scale + self.bias2c)
        f = self.conv3(nnx.relu(f + self.bias3a) + self.bias3b)
        return s + (f * self.scale + self.bias3c)


def fixup_init(config: ResNetConfig, layers: int) -> Initializer:
    """Kaiming normal (fan out) times blocks^(-1 / (2 layers - 2)): Fixup's rule 2."""
    return init.kaiming_normal("fan_out", sum(config.stages) ** (-1.0 / (2 * layers - 2)))


def scalar(value: float) -> nnx.Param:
    """A trainable float32 scalar, one of Fixup's biases and multipliers."""
    return nnx.Param(jnp.full((), value, jnp.float32))


def make_block(
    config: ResNetConfig, cin: int, channels: int, stride: int, *, rngs: nnx.Rngs
) -> nnx.Module:
    """The network's kind of block, from `cin` to `channels * config.expansion` channels."""
    kinds = (PostFixup, PreFixup) if config.residual == "fixup" else (PostBlock, PreBlock)
    return kinds[0 if config.is_post else 1](config, cin, channels, stride, rngs=rngs)
