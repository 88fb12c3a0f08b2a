"""Options of residual networks on images, and the layers that they determine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from rezero_jax.errors import UserError, check_choice, check_sizes, choose_from
from rezero_jax.models import init
from rezero_jax.models.resnet.batch_norm import BatchNorm
from rezero_jax.models.resnet.conv import as_general
from rezero_jax.residual import Rule, RuleConfig, make_rule
from rezero_jax.residual.rule import check_rule

RULES = ("residual", "zero_gamma", "gated", "fixup", "skipinit", "rezero", "rezero_channel")
PREACT_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Options of a residual network.

    Attributes:
      residual: one of `rezero_jax.models.resnet.config.RULES`, or a subclass of `Rule` with one
        stream; `preact` has no `zero_gamma`.
      num_classes: number of logits.
      width: channels of the first stage; each later stage has twice as many.
      in_channels: 3 for colour images, 1 for grey images.
      batch_norm: False replaces BatchNorm by biases, as `fixup` and `skipinit` always do.
      alpha_init: initial gate, if the rule has one; None is 0.
      scan, remat: execution of the equal blocks of a stage, see `rezero_jax.stack.Stack`. Scanned
        stages compile faster; remat="dots" rematerialises 3x3 convolutions, too.
      dtype: dtype of the computation; parameters, trunk and logits are float32.

    Raises:
      UserError: an unknown name or depth, a size below 1, or a combination that cannot learn.
    """

    depth: int = 20
    residual: str | type[Rule] = "rezero"
    num_classes: int = 10
    width: int = 16
    in_channels: int = 3
    batch_norm: bool = True
    alpha_init: float | None = None
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    # These are options of one family and constants of the other.
    family = "cifar"
    variant = "paper"
    stem = "cifar"

    def __post_init__(self) -> None:
        check_rule(self.residual, RULES)
        if isinstance(self.residual, type) and self.residual.streams > 1:
            raise UserError("a ResNet's trunk is one stream; choose a rule with streams = 1")
        check_choice("variant", self.variant, ("paper", "notebook"))
        check_choice("stem", self.stem, ("cifar", "imagenet"))
        sizes = ("depth", "num_classes", "width", "in_channels")
        check_sizes(**{name: getattr(self, name) for name in sizes})
        if self.family == "preact" and self.depth not in PREACT_BLOCKS:
            raise choose_from("depth", self.depth, map(str, PREACT_BLOCKS))
        if self.family == "cifar" and (self.depth < 8 or (self.depth - 2) % 6):
            below = max(self.depth - (self.depth - 2) % 6, 8)
            raise UserError(f"depth={self.depth} is not 6n + 2; choose {below} or {below + 6}")
        if self.residual == "zero_gamma" and (self.family == "preact" or not self.batch_norm):
            raise UserError(
                "zero_gamma needs a last BatchNorm; use ResNet.cifar with batch_norm=True or rezero"
            )

    @property
    def stages(self) -> tuple[int, ...]:
        """Number of blocks in each stage."""
        preact = self.family == "preact"
        return PREACT_BLOCKS[self.depth] if preact else ((self.depth - 2) // 6,) * 3

    @property
    def expansion(self) -> int:
        """Ratio of trunk channels to inner channels of a block: 4 in bottleneck blocks."""
        return 4 if self.family == "preact" and self.depth == 50 else 1

    @property
    def kernel_init(self) -> Initializer | None:
        """Initialiser of convolutions outside Fixup's branches; None is PyTorch's default."""
        if self.variant == "notebook":
            return init.kaiming_normal("fan_in")
        if self.family == "preact" or self.residual in ("gated", "fixup"):
            return None
        return init.kaiming_normal("fan_out")

    @property
    def has_norm(self) -> bool:
        """Whether the network has BatchNorm."""
        return self.batch_norm and self.residual not in ("fixup", "skipinit")

    def changes_shape(self, cin: int, channels: int, stride: int) -> bool:
        """Whether the output shape of such a block differs from its input shape."""
        return stride != 1 or cin != channels * self.expansion

    def conv(self, cin: int, cout: int, side: int, stride: int = 1, **options: Any) -> nnx.Conv:
        """A side x side convolution with PyTorch's padding; `nnx.Conv` documents `options`.

        The convolution has a bias if neither BatchNorm nor Fixup's scalars provide one.
        """
        uniform = init.torch_uniform(cin * side**2)
        options = {"kernel_init": self.kernel_init or uniform} | options
        return nnx.Conv(
            cin,
            cout,
            (side, side),
            stride,
            padding=side // 2,
            use_bias=not self.has_norm and self.residual != "fixup",
            bias_init=uniform,
            kernel_metadata={"matrix_axes": ((-4, -3, -2), (-1,))},
            dtype=self.dtype,
            conv_general_dilated=as_general,
            **options,
        )

    def norm(self, features: int, scale_init: float = 1.0) -> Callable[[Array], Array]:
        """A BatchNorm, or the identity in a network without BatchNorm."""
        return BatchNorm(features, scale_init=scale_init) if self.has_norm else init.identity

    def rule(self, features: int, rngs: nnx.Rngs) -> Rule:
        """The residual rule of a block without Fixup."""
        names: dict[Any, str] = {"zero_gamma": "residual", "skipinit": "rezero"}
        name = names.get(self.residual, self.residual)
        return make_rule(RuleConfig(name, self.alpha_init), features, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class CifarConfig(ResNetConfig):
    """Options of `ResNet.cifar`: three stages of post-activation blocks.

    Attributes:
      depth: 6n + 2 for n blocks in each stage, such as 20, 32, 44, 56 or 110.
      variant: "paper" (the code behind the paper's table) has a BatchNorm in each shortcut that
        subsamples and Kaiming normal convolutions by fan out (PyTorch's default for `gated` and
        the stem of `fixup`). "notebook" (the authors' notebook) has no such BatchNorm and Kaiming
        normal weights by fan in, including the head's.
    """

    variant: str = "paper"


@dataclass(frozen=True, kw_only=True)
class PreactConfig(ResNetConfig):
    """Options of `ResNet.preact`: four stages of pre-activation blocks, initialised as in PyTorch.

    Attributes:
      depth: 18 or 34 (two 3x3 convolutions in each block), or 50 (bottleneck blocks).
      stem: "cifar" keeps the resolution; "imagenet" divides it by four, for large images.
    """

    depth: int = 18
    width: int = 64
    stem: str = "cifar"
    family = "preact"
