"""Residual networks on images: the paper's CIFAR nets and pre-activation nets of ResNet's sizes."""

from collections.abc import Sequence
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
GATED = ("rezero", "rezero_channel", "gated")
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
      width, in_channels: see `cifar`.
      stem, activate_stem: `kind` and `activate` of `Stem`.
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
        in_channels: int,
        stem: str,
        *,
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
        start = nnx.initializers.zeros_init() if fixup else init.torch_uniform(cin)
        kernel_init = start if fixup else head_init or start
        self.head_bias = scalar(0.0) if fixup else None
        self.head = nnx.Linear(
            cin, num_classes, kernel_init=kernel_init, bias_init=start, rngs=rngs
        )

    def __call__(self, x: Array) -> Float[Array, "batch classes"]:
        """Returns float32 logits for images (batch, height, width, in_channels).

        Raises UserError for arrays of another shape.
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
          width: channels of the first stage; each later stage has twice as many.
          in_channels: 3 for colour images, 1 for grey ones.
          variant: "paper", as the code behind the paper's table, has a BatchNorm in each shortcut
            that subsamples and Kaiming normal convolutions by fan out (PyTorch's default for
            `gated` and for the stem of `fixup`); "notebook", as the authors' notebook, has no such
            BatchNorm and Kaiming normal weights by fan in, the head's too.
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
        of_paper = None if residual in ("gated", "fixup") else KAIMING_FAN_OUT
        by_rule = {"fixup": PostFixup} | dict.fromkeys(GATED, ReluInside)
        blocks = (depth - 2) // 6
        parts = Parts(
            block=by_rule.get(residual, ReluAfter),
            blocks=3 * blocks,
            residual=residual,
            shortcut_norm=not notebook,
            kernel_init=KAIMING_FAN_IN if notebook else of_paper,
            **options,
        )
        return cls(
            parts,
            (blocks,) * 3,
            width,
            num_classes,
            in_channels,
            "cifar",
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
          residual, width, in_channels, **options: see `cifar`; there is no `zero_gamma` here.

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
        plain, bottleneck = (
            (PreFixup, PreFixupBottleneck) if residual == "fixup" else (PreBlock, PreBottleneck)
        )
        block = bottleneck if depth == 50 else plain
        parts = Parts(block=block, blocks=sum(counts), residual=residual, **options)
        return cls(
            parts, counts, width, num_classes, in_channels, stem, activate_stem=False, rngs=rngs
        )
