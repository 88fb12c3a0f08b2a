"""Residual networks on images: the paper's CIFAR networks and pre-activation networks."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from rezero_jax.errors import UserError
from rezero_jax.models import init
from rezero_jax.models.options import takes_options
from rezero_jax.models.resnet.blocks import make_block, scalar
from rezero_jax.models.resnet.config import CifarConfig, PreactConfig, ResNetConfig
from rezero_jax.models.resnet.conv import Images
from rezero_jax.residual import trunk_dtype
from rezero_jax.stack import Stack


class Stage(nnx.Module):
    """Blocks at one resolution: `entry`, if the first block changes the shape, and equal `rest`.

    Args:
      config: options of the network.
      cin: channels of the input.
      channels: inner channels of the blocks; the output has `channels * config.expansion`.
      stride: stride of the first block.
      blocks: number of blocks.
    """

    def __init__(
        self,
        config: ResNetConfig,
        cin: int,
        channels: int,
        stride: int,
        blocks: int,
        *,
        rngs: nnx.Rngs,
    ):
        out = channels * config.expansion
        changes = stride != 1 or cin != out
        self.entry = make_block(config, cin, channels, stride, rngs=rngs) if changes else None
        equal = blocks - 1 if changes else blocks
        self.rest = (
            Stack(
                lambda rngs: make_block(config, out, channels, 1, rngs=rngs),
                equal,
                scan=config.scan,
                remat=config.remat,
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
    """Maps the image to the trunk.

    The stem "cifar" is a 3x3 convolution; "imagenet" is a 7x7 convolution with stride 2 that ends
    with a 3x3 max-pool with stride 2. In the cifar family BatchNorm (or Fixup's bias) and a ReLU
    follow the convolution.
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        large = isinstance(config, PreactConfig) and config.stem == "imagenet"
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv = config.conv(config.in_channels, config.width, kernel, stride, rngs=rngs)
        self.activate = isinstance(config, CifarConfig)
        self.norm = config.norm(config.width) if self.activate else nnx.identity
        self.bias = scalar(0.0) if self.activate and config.residual == "fixup" else None
        self.pool = large

    def __call__(self, x: Images) -> Images:
        x = self.norm(self.conv(x))
        if self.bias is not None:
            x = x + self.bias
        if self.activate:
            x = nnx.relu(x)
        if self.pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x.astype(trunk_dtype(x.dtype))


class ResNet(nnx.Module):
    """A stem, stages of residual blocks, the mean over all pixels, and a linear head.

    Make one with `ResNet.cifar` or `ResNet.preact`. The network has running statistics: call
    `model.eval()` before inference and `model.train()` before training.

    Raises:
      UserError: a size below 1; see also `ResNetConfig`.
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.in_channels = config.in_channels
        self.stem = Stem(config, rngs=rngs)
        stages, cin = [], config.width
        for i, blocks in enumerate(config.stages):
            channels, stride = config.width * 2**i, 1 if i == 0 else 2
            stages.append(Stage(config, cin, channels, stride, blocks, rngs=rngs))
            cin = channels * config.expansion
        self.stages = nnx.List(stages)
        fixup = config.residual == "fixup"
        start = nnx.initializers.zeros_init() if fixup else init.torch_uniform(cin)
        notebook = isinstance(config, CifarConfig) and config.variant == "notebook"
        self.head_bias = scalar(0.0) if fixup else None
        self.head = nnx.Linear(
            cin,
            config.num_classes,
            kernel_init=init.kaiming_normal("fan_in") if notebook and not fixup else start,
            bias_init=start,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Float[Array, "batch classes"]:
        """Returns float32 logits for images (batch, height, width, in_channels).

        Raises:
          UserError: x has another shape.
        """
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise UserError(
                f"this network takes images (batch, height, width, {self.in_channels}), not "
                f"{x.shape}; make it with in_channels={x.shape[-1]}, or convert the images"
            )
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = x.astype(jnp.float32).mean(axis=(1, 2))
        return self.head(x if self.head_bias is None else x + self.head_bias)

    @classmethod
    @takes_options("depth", "residual", "num_classes")
    def cifar(cls, *, config: CifarConfig = CifarConfig(), rngs: nnx.Rngs) -> "ResNet":
        """The network of He et al. for CIFAR-10: three stages of post-activation blocks.

        Args:
          config: options of the network; each option is an argument, too.
          rngs: source of the initial parameters.

        Raises:
          UserError: see `ResNetConfig`.
        """
        return cls(config, rngs=rngs)

    @classmethod
    @takes_options("depth", "residual", "num_classes")
    def preact(cls, *, config: PreactConfig = PreactConfig(), rngs: nnx.Rngs) -> "ResNet":
        """The paper's pre-activation network: four stages, with PyTorch's default weights.

        Args:
          config: options of the network; each option is an argument, too.
          rngs: source of the initial parameters.

        Raises:
          UserError: see `ResNetConfig`.
        """
        return cls(config, rngs=rngs)
