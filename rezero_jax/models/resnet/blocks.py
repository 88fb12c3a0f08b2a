"""The blocks of residual networks on images, each scheme beside the others, by its equation.

s(x) is the shortcut: x itself, or where a block changes the shape of its input, what `Shortcut`
or a 1x1 convolution makes of it. It is never gated. In `post` blocks (He et al., arXiv 1512.03385)
the ReLU follows the convolutions, in `pre` blocks (arXiv 1603.05027) it precedes them.

    rule         post: F = bn conv relu bn conv x         pre: F = conv relu bn conv relu bn x

    residual     x' = relu(s(x) + F(x))                   x' = s(x) + F(x)
    zero_gamma   the same, the last bn's scale starts at 0    (none)
    gated        x' = (1 - a) s(x) + a relu(F(x))         x' = (1 - a) s(x) + a F(x)
    skipinit     x' = relu(s(x) + a F(x)), F without bn   x' = s(x) + a F(x), F without bn
    rezero       x' = s(x) + a relu(F(x))                 x' = s(x) + a F(x)
    rezero_channel: the same with one a per channel
    fixup        scalar biases and a multiplier instead of bn: see `rezero_jax.models.resnet.fixup`

The gate a is a scalar that starts at 0. `residual` and `rezero` of both columns, and `zero_gamma`,
`gated` and `fixup` of the first, are those of the paper's table, as in the code behind it; the
paper discusses `skipinit` (arXiv 2002.10444) but has no numbers for it.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from rezero_jax.models.resnet.parts import Parts

Images = Float[Array, "batch _height _width _channels"]  # what they map keeps the batch alone


class Shortcut(nnx.Module):
    """s(x) of a post block that changes shape: every second pixel, then channels of zeros.

    In the nets behind the paper's table the pixels are normalised (`Parts.shortcut_norm`).
    """

    def __init__(self, cin: int, cout: int, stride: int, parts: Parts):
        self.norm = parts.norm(cin) if parts.shortcut_norm else nnx.identity
        self.stride, self.more = stride, cout - cin

    def __call__(self, x: Images) -> Images:
        x = self.norm(x[:, :: self.stride, :: self.stride])
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.more)))


class PostBlock(nnx.Module):
    """F(x) = bn conv relu bn conv x with 3x3 convolutions, and how it joins the shortcut."""

    def __init__(self, cin: int, channels: int, stride: int, parts: Parts, *, rngs: nnx.Rngs):
        self.conv1 = parts.conv(cin, channels, 3, stride=stride, rngs=rngs)
        self.norm1 = parts.norm(channels)
        self.conv2 = parts.conv(channels, channels, 3, rngs=rngs)
        self.norm2 = parts.norm(channels, 0.0 if parts.residual == "zero_gamma" else 1.0)
        changes = stride != 1 or cin != channels
        self.shortcut = Shortcut(cin, channels, stride, parts) if changes else nnx.identity
        self.rule = parts.rule(channels, rngs)

    def branch(self, x: Images) -> Images:
        """F(x)."""
        return self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))


class ReluAfter(PostBlock):
    """x' = relu(s(x) + F(x)); `skipinit`: x' = relu(s(x) + a F(x))."""

    def __call__(self, x: Images) -> Images:
        return nnx.relu(self.rule(self.shortcut(x), lambda _: self.branch(x)))


class ReluInside(PostBlock):
    """`rezero` and by channel: x' = s(x) + a relu(F(x)); `gated`: (1 - a) s(x) + a relu(F(x))."""

    def __call__(self, x: Images) -> Images:
        return self.rule(self.shortcut(x), lambda _: nnx.relu(self.branch(x)))


class PreBlock(nnx.Module):
    """With u = relu(bn x) and 3x3 convolutions: F(x) = conv relu bn conv u, and x' = s(x) + F(x).

    With a gate the sum is that of its rule, above. Where the shape changes, s(x) is a 1x1
    convolution of u.
    """

    expansion = 1  # output channels over `channels`

    def __init__(self, cin: int, channels: int, stride: int, parts: Parts, *, rngs: nnx.Rngs):
        out = channels * self.expansion
        self.norm1 = parts.norm(cin)
        changes = stride != 1 or cin != out
        self.shortcut = parts.conv(cin, out, 1, stride=stride, rngs=rngs) if changes else None
        self.make_branch(cin, channels, stride, parts, rngs)
        self.rule = parts.rule(out, rngs)

    def make_branch(
        self, cin: int, channels: int, stride: int, parts: Parts, rngs: nnx.Rngs
    ) -> None:
        """The layers of the branch."""
        self.conv1 = parts.conv(cin, channels, 3, stride=stride, rngs=rngs)
        self.norm2 = parts.norm(channels)
        self.conv2 = parts.conv(channels, channels, 3, rngs=rngs)

    def branch(self, u: Images) -> Images:
        """F as a function of u."""
        return self.conv2(nnx.relu(self.norm2(self.conv1(u))))

    def __call__(self, x: Images) -> Images:
        u = nnx.relu(self.norm1(x))
        s = x if self.shortcut is None else self.shortcut(u).astype(x.dtype)
        return self.rule(s, lambda _: self.branch(u))


class PreBottleneck(PreBlock):
    """The same with F(x) = conv1x1 relu bn conv3x3 relu bn conv1x1 u, the trunk 4 times as wide."""

    expansion = 4

    def make_branch(
        self, cin: int, channels: int, stride: int, parts: Parts, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = parts.conv(cin, channels, 1, rngs=rngs)
        self.norm2 = parts.norm(channels)
        self.conv2 = parts.conv(channels, channels, 3, stride=stride, rngs=rngs)
        self.norm3 = parts.norm(channels)
        self.conv3 = parts.conv(channels, channels * self.expansion, 1, rngs=rngs)

    def branch(self, u: Images) -> Images:
        f = self.conv2(nnx.relu(self.norm2(self.conv1(u))))
        return self.conv3(nnx.relu(self.norm3(f)))
