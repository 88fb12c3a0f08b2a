"""Residual networks on images: the paper's CIFAR nets and pre-activation nets of ResNet's sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jaxtyping import Float

from rezero_jax.errors import UserError, choose_from
from rezero_jax.models import init
from rezero_jax.models.resnet.blocks import PreBlock, PreBottleneck, ReluAfter, ReluInside
from rezero_jax.models.resnet.fixup import PostFixup, PreFixup, PreFixupBottleneck
from rezero_jax.models.resnet.parts import Parts, scalar
from rezero_jax.models.resnet.stage import Stage, Stem

PREACT_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
VARIANTS = ("paper", "notebook")
STEMS = ("cifar", "imagenet")

KAIMING_FAN_OUT = init.kaiming_normal("fan_out")
KAIMING_FAN_IN = init.kaiming_normal("fan_in")


class ResNet(nnx.Module):
    """A stem, stages of residual blocks, the mean over all pixels, a linear head.

    Made by `ResNet.cifar` and `ResNet.preact`; the rules' equations are in
    `rezero_jax.models.resnet.blocks`. It has running statistics: call `model.eval()` before
    inference and `model.train()` before training.

    Args:
      parts: makes the blocks and what they are made of.
      counts: blocks in each stage; each stage but the first halves the resolution.
      width: channels of the first stage; each later stage has twice as many.
      num_classes, in_channels: see `cifar`.
      stem: see `Stem`.
      activate_stem: whether the stem ends in BatchNorm and ReLU.
      head_init: initial distribution of the head's weights; by default PyTorch's.

    Raises:
      UserError: a size below 1.
    """

    def __init__(
        self,
        parts: Parts,
        counts: Sequence[int],
        width: int,
        num_classes: int,
        *,
        in_channels: int,
        stem: str,
        activate_stem: bool,
        head_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; a network needs at least 1")
        self.in_channels = in_channels
        self.stem = Stem(stem, in_channels, width, parts, activate=activate_stem, rngs=rngs)
        stages, cin = [], width
        for i, count in enumerate(counts):
            channels = width * 2**i
            out = channels * getattr(parts.block, "expansion", 1)
            stride = 1 if i == 0 else 2
            stages.append(Stage(parts, cin, channels, out, stride, count, rngs=rngs))
            cin = out
        self.stages = nnx.List(stages)
        fixup = parts.residual == "fixup"
        zeros = nnx.initializers.zeros_init()
        uniform = init.torch_uniform(cin)
        self.head_bias = scalar(0.0) if fixup else None
        self.head = nnx.Linear(
            cin,
            num_classes,
            kernel_init=zeros if fixup else head_init or uniform,
            bias_init=zeros if fixup else uniform,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Float[Array, "batch classes"]:
        """Returns float32 logits for images (batch, height, width, channels).

        Raises:
          UserError: x is not a batch of images with `in_channels` channels.
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
    def from_config(
        cls, config: Any, in_channels: int, num_classes: int, rngs: nnx.Rngs
    ) -> "ResNet":
        """The network that config.model describes.

        Raises:
          UserError: an unknown family; see also `cifar` and `preact`.
        """
        if config.family == "cifar":
            make, own = cls.cifar, {"variant": config.variant}
        elif config.family == "preact":
            make, own = cls.preact, {"stem": config.stem}
        else:
            raise choose_from("model.family", config.family, ("cifar", "preact"))
        return make(
            config.depth,
            config.residual,
            num_classes,
            width=config.width,
            in_channels=in_channels,
            batch_norm=config.batch_norm,
            alpha_init=config.alpha_init,
            scan=config.scan,
            remat=config.remat,
            dtype=getattr(jnp, config.dtype),
            **own,
            rngs=rngs,
        )

    @classmethod
    def cifar(
        cls,
        depth: int,
        residual: str = "rezero",
        num_classes: int = 10,
        *,
        width: int = 16,
        in_channels: int = 3,
        variant: str = "paper",
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "ResNet":
        """The network of He et al. for CIFAR-10: three stages of post-activation blocks.

        Args:
          depth: 6n + 2 for n blocks a stage, such as 20, 32, 44, 56 or 110.
          residual: a name of `rezero_jax.models.resnet.parts.RULES`.
          num_classes: number of logits.
          width: channels of the first stage; each later stage has twice as many.
          in_channels: 3 for colour images, 1 for grey ones.
          variant: "paper", the code behind the paper's table: a BatchNorm in each shortcut that
            subsamples, Kaiming normal convolutions by fan out (PyTorch's default for `gated` and
            for the stem of `fixup`); "notebook", the authors' notebook: none there, Kaiming normal
            by fan in, in the head too.
          rngs: source of the initial parameters.
          **options: batch_norm, alpha_init, scan, remat, dtype: see `Parts`.

        Raises:
          UserError: another depth, an unknown rule or variant, or an impossible combination.
        """
        if depth < 8 or (depth - 2) % 6:
            below = max(depth - (depth - 2) % 6, 8)
            raise UserError(
                f"depth={depth} is not 6n + 2; the closest depths are {below} and {below + 6}"
            )
        if variant not in VARIANTS:
            raise choose_from("variant", variant, VARIANTS)
        notebook = variant == "notebook"
        kernel_init = KAIMING_FAN_IN if notebook else KAIMING_FAN_OUT
        if residual == "fixup":
            block: Callable[..., nnx.Module] = PostFixup
        else:
            block = ReluInside if residual in ("rezero", "gated") else ReluAfter
        blocks = (depth - 2) // 6
        parts = Parts(
            block=block,
            blocks=3 * blocks,
            residual=residual,
            shortcut_norm=not notebook,
            kernel_init=None if residual in ("gated", "fixup") and not notebook else kernel_init,
            **options,
        )
        return cls(
            parts,
            (blocks,) * 3,
            width,
            num_classes,
            in_channels=in_channels,
            stem="cifar",
            activate_stem=True,
            head_init=KAIMING_FAN_IN if notebook else None,
            rngs=rngs,
        )

    @classmethod
    def preact(
        cls,
        depth: int,
        residual: str = "rezero",
        num_classes: int = 10,
        *,
        width: int = 64,
        in_channels: int = 3,
        stem: str = "cifar",
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "ResNet":
        """Four stages of pre-activation blocks, as in the paper's table; PyTorch's default init.

        Args:
          depth: 18 or 34 (two 3x3 convolutions a block), 50 (bottleneck blocks).
          stem: "cifar" keeps the resolution; "imagenet" lowers it four times, for large images.
          residual, num_classes, width, in_channels, rngs, **options: see `cifar`; `zero_gamma`
            does not exist here.

        Raises:
          UserError: another depth, an unknown rule or stem, or an impossible combination.
        """
        if depth not in PREACT_BLOCKS:
            raise choose_from("depth", depth, map(str, PREACT_BLOCKS))
        if stem not in STEMS:
            raise choose_from("stem", stem, STEMS)
        if residual == "zero_gamma":
            raise UserError(
                "zero_gamma needs a branch that ends in a BatchNorm; the last one of a "
                "pre-activation block feeds a ReLU, where a scale of zero would never get a "
                "gradient: use rezero"
            )
        counts = PREACT_BLOCKS[depth]
        blocks = (
            (PreFixup, PreFixupBottleneck) if residual == "fixup" else (PreBlock, PreBottleneck)
        )
        parts = Parts(block=blocks[depth == 50], blocks=sum(counts), residual=residual, **options)
        return cls(
            parts,
            counts,
            width,
            num_classes,
            in_channels=in_channels,
            stem=stem,
            activate_stem=False,
            rngs=rngs,
        )
