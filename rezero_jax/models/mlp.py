"""The deep fully connected network of the paper's section 4 and of the authors' notebook."""

import math
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jaxtyping import Float

from rezero_jax.errors import UserError, check_between, check_sizes
from rezero_jax.models import init
from rezero_jax.models.options import Module, takes_options
from rezero_jax.residual import Place, RuleConfig, make_rule, trunk_dtype
from rezero_jax.stack import Stack

# A layer that is sharded by its outputs along the mesh axis `model`.
_linear = partial(init.linear, kernel_metadata={"model_axis": -1}, bias_metadata={"model_axis": -1})

# At 64, the TPU compiler's estimate of a step falls to less than half (docs/accelerators.md).
UNROLL = 64
GPU_UNROLL = 25  # 10,000 layers: 98 ms, predicted for an H200; with 10 or 50, 106 or 97


class Block(nnx.Module):
    """One hidden layer; the branch is F(x) = relu(W x + b), with the gate outside of the ReLU."""

    def __init__(
        self,
        width: int,
        config: RuleConfig,
        kernel_init: Initializer,
        dtype: Any,
        place: Place,
        rngs: nnx.Rngs,
    ):
        scaled = init.times(config.rule.branch_gain(place), kernel_init)
        self.linear = _linear(width, width, kernel_init=scaled, dtype=dtype, rngs=rngs)
        self.rule = make_rule(config, width, place=place, rngs=rngs)

    def __call__(self, x: Float[Array, "*trunk width"]) -> Float[Array, "*trunk width"]:
        return self.rule(x, lambda trunk: nnx.relu(self.linear(trunk)))


class MLP(Module):
    """Linear and ReLU into the trunk, `depth` hidden layers of one width, a linear head.

    Initial distributions are those of the authors' notebook: Kaiming normal for the input layer,
    Normal(0, weight_variance / width) for the hidden layers, PyTorch's Linear default
    U(+-1/sqrt(fan_in)) for the head and for every bias.

    Args:
      in_features: size of the last axis of the input.
      width: size of the trunk.
      depth: number of hidden layers, without the input layer and the head.
      out_features: size of the last axis of the output.
      weight_variance: variance of the hidden weights times the width; None is the paper's: 0.25
        for `residual`, whose signal would otherwise grow by half in every layer; else 2.
      scan: see `rezero_jax.stack.Stack`.
      remat: see `rezero_jax.stack.Stack`.
      dtype: dtype of the computation; parameters, trunk and logits are float32.

    Raises:
      UserError: an argument is out of range or unknown, or the rule is `sub_norm`.

    Examples:
      >>> model = MLP(in_features=64, width=32, depth=100, out_features=10, rngs=nnx.Rngs(0))
      >>> assert model(jnp.ones((8, 64))).shape == (8, 10)
    """

    # XLA splits each product of a few hundred rows and columns into eight, whose sum takes a second
    # kernel: most of a deep narrow network's time is the launch of kernels.
    gpu_compiler_options: ClassVar[dict[str, Any]] = {"xla_gpu_experimental_force_split_k": 1}

    @takes_options("residual")
    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        out_features: int,
        *args: Any,
        weight_variance: float | None = None,
        scan: bool = True,
        remat: str = "none",
        dtype: Any = jnp.float32,
        config: RuleConfig = RuleConfig(),
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_sizes(in_features=in_features, width=width, out_features=out_features)
        check_between(0, weight_variance, math.inf, "weight_variance")
        if config.rule.has_inner_norm:
            raise UserError(
                f"{config.residual} needs branches of two matrices; choose pre_norm or peri_norm"
            )
        if weight_variance is None:
            weight_variance = 0.25 if config.residual == "residual" else 2.0
        he = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.stem = _linear(in_features, width, kernel_init=he, dtype=dtype, rngs=rngs)
        self.rule = config.rule
        normal = nnx.initializers.normal(np.sqrt(weight_variance / width))
        make = partial(Block, width, config, normal, dtype)
        self.trunk = Stack(
            lambda rngs, layer: make(Place(layer, depth), rngs),
            depth,
            numbered=True,
            scan=scan,
            remat=remat,
            unroll=UNROLL,
            gpu_unroll=GPU_UNROLL,
            gpu_chain=True,
            rngs=rngs,
        )
        self.head = init.linear(width, out_features, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        """Returns float32 logits; raises a UserError if x has not `in_features` features."""
        if x.shape[-1:] != (self.stem.in_features,):
            raise UserError(f"x is {x.shape}, not (..., {self.stem.in_features}); reshape it")
        x = nnx.relu(self.stem(x))
        x = self.rule.leave(self.trunk(self.rule.enter(x.astype(trunk_dtype(x.dtype)))))
        return self.head(x.astype(jnp.float32))
