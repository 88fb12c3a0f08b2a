"""Fixup's blocks: no normalisation, but scalar biases, a multiplier, and small initial weights.

Zhang et al., arXiv 1901.09321, and their code for CIFAR-10, which the paper's table uses.
"""

from flax import nnx
from jax.nn.initializers import Initializer

from rezero_jax.models import init
from rezero_jax.models.resnet.blocks import Images, Shortcut
from rezero_jax.models.resnet.parts import Parts, scalar


class PostFixup(nnx.Module):
    """x' = relu(s(x) + c conv(relu(conv(x + b1a) + b1b) + b2a) + b2b), at first b = 0 and c = 1.

    The first convolution starts at Kaiming's deviation (fan out) times blocks^(-1/2), the second
    at zero. A shortcut that subsamples takes x + b1a.
    """

    def __init__(self, cin: int, channels: int, stride: int, parts: Parts, *, rngs: nnx.Rngs):
        self.conv1 = parts.conv(
            cin, channels, 3, stride=stride, kernel_init=fixup_init(parts.blocks, 2), rngs=rngs
        )
        self.conv2 = parts.conv(
            channels, channels, 3, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )
        changes = stride != 1 or cin != channels
        self.shortcut = Shortcut(cin, channels, stride, parts) if changes else None
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (scalar(0.0) for _ in range(4))
        self.scale = scalar(1.0)

    def __call__(self, x: Images) -> Images:
        u = x + self.bias1a
        f = self.conv2(nnx.relu(self.conv1(u) + self.bias1b) + self.bias2a)
        s = x if self.shortcut is None else self.shortcut(u)
        return nnx.relu(s + (f * self.scale + self.bias2b))


class PreFixup(nnx.Module):
    """With u = relu(x + b1a) + b1b: x' = s(x) + c conv(relu(conv(u) + b2a) + b2b) + b2c.

    Fixup's rules applied to a pre-activation block: a scalar bias before each convolution and each
    ReLU, a multiplier c = 1, the last convolution 0, the others scaled by blocks^(-1/2).
    """

    expansion = 1

    def __init__(self, cin: int, channels: int, stride: int, parts: Parts, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        small = fixup_init(parts.blocks, 2)
        self.conv1 = parts.conv(cin, channels, 3, stride=stride, kernel_init=small, rngs=rngs)
        self.conv2 = parts.conv(channels, channels, 3, kernel_init=zeros, rngs=rngs)
        changes = stride != 1 or cin != channels
        self.shortcut = parts.conv(cin, channels, 1, stride=stride, rngs=rngs) if changes else None
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

    def __init__(self, cin: int, channels: int, stride: int, parts: Parts, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        small = fixup_init(parts.blocks, 3)
        out = channels * self.expansion
        self.conv1 = parts.conv(cin, channels, 1, kernel_init=small, rngs=rngs)
        self.conv2 = parts.conv(channels, channels, 3, stride=stride, kernel_init=small, rngs=rngs)
        self.conv3 = parts.conv(channels, out, 1, kernel_init=zeros, rngs=rngs)
        changes = stride != 1 or cin != out
        self.shortcut = parts.conv(cin, out, 1, stride=stride, rngs=rngs) if changes else None
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


def fixup_init(blocks: int, layers: int) -> Initializer:
    """Kaiming normal (fan out) times blocks^(-1 / (2 layers - 2)): Fixup's rule 2."""
    return init.kaiming_normal("fan_out", blocks ** (-1.0 / (2 * layers - 2)))
