"""What the parts of one residual network on images have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from rezero_jax.errors import UserError, choose_from
from rezero_jax.models.resnet.batch_norm import BatchNorm
from rezero_jax.models.resnet.conv import Conv
from rezero_jax.residual import Rule, make_rule

RULES = ("residual", "zero_gamma", "gated", "fixup", "skipinit", "rezero", "rezero_channel")
JOINED_AS = {"zero_gamma": "residual", "skipinit": "rezero"}
NORM_FREE = ("fixup", "skipinit")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Makes the parts of a network: its blocks, and what stem and blocks are made of.

    Attributes:
      block: class of the blocks, called with (in channels, channels, stride, parts, rngs=rngs).
      blocks: number of blocks in the network, for Fixup's initial variance.
      residual: one of RULES.
      batch_norm: False leaves out every BatchNorm, as `fixup` and `skipinit` do anyway;
        convolutions then have biases.
      shortcut_norm: whether a shortcut that subsamples has a BatchNorm (post-activation blocks).
      kernel_init: initial distribution of the convolutions; None is PyTorch's default.
      alpha_init: initial gate, where the rule has one; by default 0.
      scan, remat: of the equal blocks of a stage, see `rezero_jax.stack.Stack`. Scanned stages
        compile faster at great depth; a step takes the same time (ResNet-20 on a CPU). Convolutions
        are no matrix products: remat="dots" does what "full" does where all kernels are 3x3.
      dtype: dtype of the computation; parameters, trunk and logits are float32.

    Raises:
      UserError: an unknown rule, or `batch_norm` that contradicts the rule.
    """

    block: Callable[..., nnx.Module]
    blocks: int
    residual: str
    batch_norm: bool = True
    shortcut_norm: bool = False
    kernel_init: Initializer | None = None
    alpha_init: float | None = None
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

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

    def rule(self, channels: int, rngs: nnx.Rngs) -> Rule:
        """How branch and shortcut are joined."""
        name = JOINED_AS.get(self.residual, self.residual)
        return make_rule(name, channels, alpha_init=self.alpha_init, rngs=rngs)


def scalar(value: float) -> nnx.Param:
    """A trainable float32 scalar, one of Fixup's biases and multipliers."""
    return nnx.Param(jnp.full((), value, jnp.float32))
