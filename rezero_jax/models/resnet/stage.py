"""The stem of a residual network on images, and its stages of blocks at one resolution."""

from flax import nnx

from rezero_jax.models.resnet.blocks import Images
from rezero_jax.models.resnet.parts import Parts, scalar
from rezero_jax.residual import trunk_dtype
from rezero_jax.stack import Stack


class Stage(nnx.Module):
    """Blocks at one resolution: `entry`, if the first changes the shape, and the equal `rest`.

    Args:
      parts: makes the blocks.
      cin, channels, out: channels of the input, inside a block, and of the output.
      stride: of the first block.
      blocks: how many.
    """

    def __init__(
        self,
        parts: Parts,
        cin: int,
        channels: int,
        out: int,
        stride: int,
        blocks: int,
        *,
        rngs: nnx.Rngs,
    ):
        changes = stride != 1 or cin != out
        self.entry = parts.block(cin, channels, stride, parts, rngs=rngs) if changes else None
        equal = blocks - 1 if changes else blocks
        self.rest = (
            Stack(
                lambda rngs: parts.block(out, channels, 1, parts, rngs=rngs),
                equal,
                scan=parts.scan,
                remat=parts.remat,
                rngs=rngs,
            )
            if equal
            else None
        )

    def __call__(self, x: Images) -> Images:
        if self.entry is not None:
            x = self.entry(x)
        return x if self.rest is None else self.rest(x)


class Stem(nnx.Module):
    """From the image to the trunk.

    Args:
      kind: "cifar" is a 3x3 convolution; "imagenet" one of 7x7 with stride 2, and after whatever
        follows it a 3x3 max-pool with stride 2.
      activate: whether BatchNorm (or Fixup's bias) and ReLU follow.
    """

    def __init__(
        self,
        kind: str,
        cin: int,
        channels: int,
        parts: Parts,
        *,
        activate: bool,
        rngs: nnx.Rngs,
    ):
        kernel, stride = (3, 1) if kind == "cifar" else (7, 2)
        self.conv = parts.conv(cin, channels, kernel, stride=stride, rngs=rngs)
        self.activate = activate
        self.norm = parts.norm(channels) if activate else nnx.identity
        self.bias = scalar(0.0) if activate and parts.residual == "fixup" else None
        self.pool = kind == "imagenet"

    def __call__(self, x: Images) -> Images:
        x = self.norm(self.conv(x))
        if self.bias is not None:
            x = x + self.bias
        if self.activate:
            x = nnx.relu(x)
        if self.pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x.astype(trunk_dtype(x.dtype))
