"""Residual networks on images: the paper's CIFAR networks and pre-activation networks."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from rezero_jax.devices import check_auto
from rezero_jax.errors import check_images
from rezero_jax.models import init
from rezero_jax.models.options import takes_options
from rezero_jax.models.resnet.blocks import BLOCKS, ZEROS, scalar
from rezero_jax.models.resnet.config import CifarConfig, PreactConfig, ResNetConfig
from rezero_jax.models.resnet.conv import Images
from rezero_jax.residual import trunk_dtype
from rezero_jax.stack import Stack


class Stage(nnx.Module):
    """Stage i of a network: an `entry` block that changes the shape, if any, and equal blocks."""

    def __init__(self, config: ResNetConfig, i: int, rngs: nnx.Rngs):
        make = partial(BLOCKS[config.family][config.residual == "fixup"], config)
        channels = config.width * 2**i
        out = channels * config.expansion
        cin, stride = (config.width, 1) if i == 0 else (out // 2, 2)
        changes = config.changes_shape(cin, channels, stride)
        self.entry = make(cin, channels, stride, rngs) if changes else None
        rest = None
        if equal := config.stages[i] - changes:
            make_equal = partial(make, out, channels, 1)
            rest = Stack(make_equal, equal, scan=config.scan, remat=config.remat, rngs=rngs)
        self.rest = rest

    def __call__(self, x: Images) -> Images:
        if self.entry is not None:
            x = self.entry(x)
        return x if self.rest is None else self.rest(x)


class Stem(nnx.Module):
    """Maps images to the trunk by a 3x3 convolution, or a 7x7 one of stride 2 and a max-pool.

    In the cifar family, BatchNorm (or Fixup's bias) and a ReLU follow the convolution.
    """

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs):
        self.pool = config.stem == "imagenet"
        kernel, stride = (7, 2) if self.pool else (3, 1)
        self.conv = config.conv(config.in_channels, config.width, kernel, stride, rngs=rngs)
        self.activate = config.family == "cifar"
        self.norm = config.norm(config.width) if self.activate else init.identity
        self.bias = scalar(0.0) if self.activate and config.residual == "fixup" else None

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

    `ResNet.cifar` and `ResNet.preact` make one. The network has running statistics: call
    `model.eval()` before inference and `model.train()` before training.

    Examples:
      >>> model = ResNet.cifar(20, residual="rezero", num_classes=10, rngs=nnx.Rngs(0))
      >>> assert model(jnp.ones((2, 32, 32, 3))).shape == (2, 10)
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.in_channels = config.in_channels
        self.stem = Stem(config, rngs)
        count = len(config.stages)
        self.stages = nnx.List([Stage(config, i, rngs) for i in range(count)])
        features = config.width * 2 ** (count - 1) * config.expansion
        fixup = config.residual == "fixup"
        bias_init = ZEROS if fixup else init.torch_uniform(features)
        he = config.variant == "notebook" and not fixup
        kernel_init = init.kaiming_normal("fan_in") if he else bias_init
        self.head_bias = scalar(0.0) if fixup else None
        self.head = nnx.Linear(
            features, config.num_classes, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs
        )

    def __call__(self, x: Array) -> Float[Array, "batch classes"]:
        """Returns float32 logits for images (batch, height, width, in_channels)."""
        check_auto(x)
        check_images(x.shape, self.in_channels)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = x.astype(jnp.float32).mean(axis=(1, 2))
        return self.head(x if self.head_bias is None else x + self.head_bias)

    @classmethod
    @takes_options("depth", "residual", "num_classes")
    def cifar(cls, *, config: CifarConfig = CifarConfig(), rngs: nnx.Rngs) -> "ResNet":
        """The network of He et al. for CIFAR-10: three stages of post-activation blocks."""
        return cls(config, rngs=rngs)

    @classmethod
    @takes_options("depth", "residual", "num_classes")
    def preact(cls, *, config: PreactConfig = PreactConfig(), rngs: nnx.Rngs) -> "ResNet":
        """The paper's pre-activation network: four stages, with PyTorch's default weights."""
        return cls(config, rngs=rngs)
