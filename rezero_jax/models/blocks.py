"""The blocks of residual networks on images, each scheme beside the others, by its equation.

s(x) is the shortcut: x itself, or where a block changes the shape of its input, what `Shortcut`
or a 1x1 convolution makes of it. It is never gated. `post` blocks (He et al., arXiv 1512.03385)
end in a ReLU, `pre` blocks (arXiv 1603.05027) begin with one.

    rule         post: F = bn conv relu bn conv x         pre: F = conv relu bn conv relu bn x

    residual     x' = relu(s(x) + F(x))                   x' = s(x) + F(x)
    zero_gamma   the same, the last bn's scale starts at 0    (none)
    gated        x' = (1 - a) s(x) + a relu(F(x))         x' = (1 - a) s(x) + a F(x)
    skipinit     x' = relu(s(x) + a F(x)), F without bn   x' = s(x) + a F(x), F without bn
    rezero       x' = s(x) + a relu(F(x))                 x' = s(x) + a F(x)
    fixup        scalar biases and a multiplier in place of bn, see the classes

The gate a is a scalar that starts at 0. Sources: paper, section 4 and the code behind its table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jaxtyping import Float

from rezero_jax import init
from rezero_jax.errors import UserError, choose_from
from rezero_jax.models.batch_norm import BatchNorm
from rezero_jax.models.conv import Conv
from rezero_jax.residual import Residual, Rule, make_rule

RULES = ("residual", "zero_gamma", "gated", "fixup", "skipinit", "rezero")
NORM_FREE = ("fixup", "skipinit")
GATED = ("gated", "skipinit", "rezero")

Images = Float[Array, "batch height width channels"]


@dataclass(frozen=True)
class Style:
    """What the blocks of one network have in common.

    Attributes:
      residual: one of RULES.
      batch_norm: False leaves out every BatchNorm; convolutions then have biases.
      shortcut_norm: whether a shortcut that subsamples has a BatchNorm (`post` blocks).
      alpha_init: the gate's initial value.
      kernel_init: initial distribution of the convolutions; None is PyTorch's default.
      blocks: number of blocks in the network, for Fixup's initial variance.
      dtype: dtype of the computation.

    Raises:
      UserError: an unknown rule, or `batch_norm` that contradicts the rule.
    """

    residual: str
    batch_norm: bool
    shortcut_norm: bool
    alpha_init: float
    kernel_init: Initializer | None
    blocks: int
    dtype: Any

    def __post_init__(self) -> None:
        if self.residual not in RULES:
            raise choose_from("residual rule", self.residual, RULES)
        if self.residual == "zero_gamma" and not self.batch_norm:
            raise UserError("zero_gamma is the initial scale of a BatchNorm; set batch_norm=True")

    @property
    def normed(self) -> bool:
        """Whether there is any BatchNorm."""
        return self.batch_norm and self.residual not in NORM_FREE

    def conv(
        self,
        cin: int,
        cout: int,
        kernel: int,
        *,
        stride: int = 1,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ) -> Conv:
        """A convolution; it has a bias where neither a BatchNorm nor Fixup's scalars give one."""
        return Conv(
            cin,
            cout,
            kernel,
            stride=stride,
            bias=not self.normed and self.residual != "fixup",
            kernel_init=kernel_init or self.kernel_init,
            dtype=self.dtype,
            rngs=rngs,
        )

    def norm(self, features: int, scale_init: float = 1.0) -> Callable[[Array], Array]:
        """A BatchNorm, or the identity in a network without."""
        return BatchNorm(features, scale_init=scale_init) if self.normed else nnx.identity

    def rule(self, rngs: nnx.Rngs) -> Rule:
        """How branch and shortcut are joined."""
        if self.residual not in GATED:
            return Residual()
        name = "gated" if self.residual == "gated" else "rezero"
        return make_rule(name, 1, alpha_init=self.alpha_init, rngs=rngs)


class Shortcut(nnx.Module):
    """s(x) of a post block that changes shape: every second pixel, then channels of zeros.

    In the nets behind the paper's table the pixels are normalised (`Style.shortcut_norm`).
    """

    def __init__(self, cin: int, cout: int, stride: int, style: Style):
        self.norm = style.norm(cin) if style.shortcut_norm else nnx.identity
        self.stride, self.more = stride, cout - cin

    def __call__(self, x: Images) -> Images:
        x = self.norm(x[:, :: self.stride, :: self.stride])
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.more)))


class PostBlock(nnx.Module):
    """F(x) = bn conv relu bn conv x with 3x3 convolutions, and how it joins the shortcut."""

    def __init__(self, cin: int, channels: int, stride: int, style: Style, *, rngs: nnx.Rngs):
        self.conv1 = style.conv(cin, channels, 3, stride=stride, rngs=rngs)
        self.norm1 = style.norm(channels)
        self.conv2 = style.conv(channels, channels, 3, rngs=rngs)
        self.norm2 = style.norm(channels, 0.0 if style.residual == "zero_gamma" else 1.0)
        changes = stride != 1 or cin != channels
        self.shortcut = Shortcut(cin, channels, stride, style) if changes else nnx.identity
        self.rule = style.rule(rngs)

    def branch(self, x: Images) -> Images:
        """F(x)."""
        return self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))


class ReluAfter(PostBlock):
    """x' = relu(s(x) + F(x)); `skipinit`: x' = relu(s(x) + a F(x))."""

    def __call__(self, x: Images) -> Images:
        return nnx.relu(self.rule(self.shortcut(x), lambda _: self.branch(x)))


class ReluInside(PostBlock):
    """`rezero`: x' = s(x) + a relu(F(x)); `gated`: x' = (1 - a) s(x) + a relu(F(x))."""

    def __call__(self, x: Images) -> Images:
        return self.rule(self.shortcut(x), lambda _: nnx.relu(self.branch(x)))


class PostFixup(nnx.Module):
    """x' = relu(s(x) + c conv(relu(conv(x + b1a) + b1b) + b2a) + b2b), at first b = 0 and c = 1.

    The first convolution starts at Kaiming's deviation (fan out) times blocks^(-1/2), the second
    at zero. A shortcut that subsamples takes x + b1a (Zhang et al., arXiv 1901.09321, and code).
    """

    def __init__(self, cin: int, channels: int, stride: int, style: Style, *, rngs: nnx.Rngs):
        self.conv1 = style.conv(
            cin, channels, 3, stride=stride, kernel_init=fixup_init(style.blocks, 2), rngs=rngs
        )
        self.conv2 = style.conv(
            channels, channels, 3, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )
        changes = stride != 1 or cin != channels
        self.shortcut = Shortcut(cin, channels, stride, style) if changes else None
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (scalar(0.0) for _ in range(4))
        self.scale = scalar(1.0)

    def __call__(self, x: Images) -> Images:
        u = x + self.bias1a
        f = self.conv2(nnx.relu(self.conv1(u) + self.bias1b) + self.bias2a)
        s = x if self.shortcut is None else self.shortcut(u)
        return nnx.relu(s + (f * self.scale + self.bias2b))


class PreBlock(nnx.Module):
    """With u = relu(bn x) and 3x3 convolutions: F(x) = conv relu bn conv u, and x' = s(x) + F(x).

    The sum is `gated`'s or ReZero's where the rule says so: x' = s(x) + a F(x). Where the shape
    changes s(x) is a 1x1 convolution of u.
    """

    expansion = 1  # output channels over `channels`

    def __init__(self, cin: int, channels: int, stride: int, style: Style, *, rngs: nnx.Rngs):
        out = channels * self.expansion
        self.norm1 = style.norm(cin)
        changes = stride != 1 or cin != out
        self.shortcut = style.conv(cin, out, 1, stride=stride, rngs=rngs) if changes else None
        self.make_branch(cin, channels, stride, style, rngs)
        self.rule = style.rule(rngs)

    def make_branch(
        self, cin: int, channels: int, stride: int, style: Style, rngs: nnx.Rngs
    ) -> None:
        """The layers of the branch."""
        self.conv1 = style.conv(cin, channels, 3, stride=stride, rngs=rngs)
        self.norm2 = style.norm(channels)
        self.conv2 = style.conv(channels, channels, 3, rngs=rngs)

    def branch(self, u: Images) -> Images:
        """F as a function of u."""
        return self.conv2(nnx.relu(self.norm2(self.conv1(u))))

    def __call__(self, x: Images) -> Images:
        u = nnx.relu(self.norm1(x))
        s = x if self.shortcut is None else self.shortcut(u)
        return self.rule(s, lambda _: self.branch(u))


class PreBottleneck(PreBlock):
    """The same with F(x) = conv1x1 relu bn conv3x3 relu bn conv1x1 u, the trunk 4 times as wide."""

    expansion = 4

    def make_branch(
        self, cin: int, channels: int, stride: int, style: Style, rngs: nnx.Rngs
    ) -> None:
        """The layers of the branch."""
        self.conv1 = style.conv(cin, channels, 1, rngs=rngs)
        self.norm2 = style.norm(channels)
        self.conv2 = style.conv(channels, channels, 3, stride=stride, rngs=rngs)
        self.norm3 = style.norm(channels)
        self.conv3 = style.conv(channels, channels * self.expansion, 1, rngs=rngs)

    def branch(self, u: Images) -> Images:
        """F as a function of u."""
        f = self.conv2(nnx.relu(self.norm2(self.conv1(u))))
        return self.conv3(nnx.relu(self.norm3(f)))


class PreFixup(nnx.Module):
    """With u = relu(x + b1a) + b1b: x' = s(x) + c conv(relu(conv(u) + b2a) + b2b) + b2c.

    Fixup's rules applied to a pre-activation block: a scalar bias before each convolution and each
    ReLU, a multiplier c = 1, the last convolution 0, the others scaled by blocks^(-1/2).
    """

    expansion = 1

    def __init__(self, cin: int, channels: int, stride: int, style: Style, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        small = fixup_init(style.blocks, 2)
        self.conv1 = style.conv(cin, channels, 3, stride=stride, kernel_init=small, rngs=rngs)
        self.conv2 = style.conv(channels, channels, 3, kernel_init=zeros, rngs=rngs)
        changes = stride != 1 or cin != channels
        self.shortcut = style.conv(cin, channels, 1, stride=stride, rngs=rngs) if changes else None
        self.bias1a, self.bias1b = scalar(0.0), scalar(0.0)
        self.bias2a, self.bias2b, self.bias2c = (scalar(0.0) for _ in range(3))
        self.scale = scalar(1.0)

    def __call__(self, x: Images) -> Images:
        u = nnx.relu(x + self.bias1a) + self.bias1b
        s = x if self.shortcut is None else self.shortcut(u)
        f = self.conv2(nnx.relu(self.conv1(u) + self.bias2a) + self.bias2b)
        return s + (f * self.scale + self.bias2c)


class PreFixupBottleneck(nnx.Module):
    """The same with three convolutions, 1x1, 3x3 and 1x1; the first two scaled by blocks^(-1/4)."""

    expansion = 4

    def __init__(self, cin: int, channels: int, stride: int, style: Style, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        small = fixup_init(style.blocks, 3)
        out = channels * self.expansion
        self.conv1 = style.conv(cin, channels, 1, kernel_init=small, rngs=rngs)
        self.conv2 = style.conv(channels, channels, 3, stride=stride, kernel_init=small, rngs=rngs)
        self.conv3 = style.conv(channels, out, 1, kernel_init=zeros, rngs=rngs)
        changes = stride != 1 or cin != out
        self.shortcut = style.conv(cin, out, 1, stride=stride, rngs=rngs) if changes else None
        self.bias1a, self.bias1b = scalar(0.0), scalar(0.0)
        self.bias2a, self.bias2b = scalar(0.0), scalar(0.0)
        self.bias3a, self.bias3b, self.bias3c = (scalar(0.0) for _ in range(3))
        self.scale = scalar(1.0)

    def __call__(self, x: Images) -> Images:
        u = nnx.relu(x + self.bias1a) + self.bias1b
        s = x if self.shortcut is None else self.shortcut(u)
        f = nnx.relu(self.conv1(u) + self.bias2a) + self.bias2b
        f = self.conv3(nnx.relu(self.conv2(f) + self.bias3a) + self.bias3b)
        return s + (f * self.scale + self.bias3c)


def post_block(style: Style) -> type[PostFixup] | type[PostBlock]:
    """The post-activation block of a rule."""
    if style.residual == "fixup":
        return PostFixup
    return ReluInside if style.residual in ("rezero", "gated") else ReluAfter


def pre_block(
    style: Style, bottleneck: bool
) -> type[PreBlock] | type[PreFixup] | type[PreFixupBottleneck]:
    """The pre-activation block of a rule.

    Raises:
      UserError: zero_gamma, which does not exist here.
    """
    if style.residual == "zero_gamma":
        raise UserError(
            "zero_gamma needs a branch that ends in a BatchNorm; the last one of a pre-activation "
            "block feeds a ReLU, where a scale of zero would never get a gradient: use rezero"
        )
    if style.residual == "fixup":
        return PreFixupBottleneck if bottleneck else PreFixup
    return PreBottleneck if bottleneck else PreBlock


def scalar(value: float) -> nnx.Param:
    """A trainable float32 scalar, one of Fixup's biases and multipliers."""
    return nnx.Param(jnp.full((), value, jnp.float32))


def fixup_init(blocks: int, layers: int) -> Initializer:
    """Kaiming normal (fan out) times blocks^(-1 / (2 layers - 2)): Fixup's rule 2."""
    return init.kaiming_normal("fan_out", blocks ** (-1.0 / (2 * layers - 2)))
