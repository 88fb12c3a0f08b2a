"""The vision Transformer (ViT, arXiv 2010.11929): an image as a sequence of its patches."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from rezero_jax.devices import check_auto
from rezero_jax.errors import UserError, check_choice, check_images, check_sizes
from rezero_jax.models import init
from rezero_jax.models.dropout import Dropout
from rezero_jax.models.options import Module, takes_options
from rezero_jax.models.transformer.attention import Hidden
from rezero_jax.models.transformer.config import TransformerConfig
from rezero_jax.models.transformer.layer import Encoder
from rezero_jax.residual import trunk_dtype

Images = Float[Array, "batch rows columns channels"]

POOLS = ("token", "mean")
EPSILON = 1e-6  # in every norm, as in the ViT paper's code and in timm
POSITION_DEVIATION = 0.02  # as in both


class ViT(Module):
    """Patches and learned positions, `depth` encoder layers, and a linear head on the pooled trunk.

    The patches' weights and the head start as PyTorch's, positions as Normal(0, 0.02), and the
    class token at 0; the layers start as `EncoderLayer`s. Trunk and logits are float32. The dropout
    also applies to the embedding with its positions.

    Args:
      image_size: height and width of the images, in pixels.
      patch: height and width of a patch; divides image_size.
      width: size of the trunk.
      depth: number of layers.
      heads: attention heads; divides width.
      num_classes: number of logits.
      in_channels: channels of the images.
      pool: the head's input: "token", a class token that precedes the patches, or "mean", the mean
        over the patches without a class token. (timm's global_pool "token" and "avg".)
      final_norm: whether a norm precedes the head; None is yes for the rules that normalise the
        branch alone, as pre-norm does.
      scan: see `rezero_jax.stack.Stack`.
      remat: see `rezero_jax.stack.Stack`.

    Raises:
      UserError: an argument is out of range or unknown, or a size does not divide.

    Examples:
      >>> model = ViT(32, patch=8, width=64, depth=2, heads=2, num_classes=10, rngs=nnx.Rngs(0))
      >>> assert model(jnp.ones((2, 32, 32, 3))).shape == (2, 10)
    """

    @takes_options("residual")
    def __init__(
        self,
        image_size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
        *args: Any,
        in_channels: int = 3,
        pool: str = "token",
        final_norm: bool | None = None,
        scan: bool = True,
        remat: str = "none",
        config: TransformerConfig = TransformerConfig(activation="gelu"),
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_sizes(image_size=image_size, patch=patch, width=width)
        check_sizes(num_classes=num_classes, in_channels=in_channels)
        if image_size < patch or image_size % patch:
            raise UserError(f"patch={patch} is no divisor of image_size={image_size}; choose one")
        check_choice("pool", pool, POOLS)
        self.image_size, self.patch = image_size, patch
        pixels, patches = patch * patch * in_channels, (image_size // patch) ** 2
        self.embedding = init.linear(pixels, width, dtype=config.dtype, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((width,), jnp.float32)) if pool == "token" else None
        normal = nnx.initializers.normal(POSITION_DEVIATION)
        length = patches + (pool == "token")
        self.position = nnx.Param(normal(rngs.params(), (length, width), jnp.float32))
        self.dropout = Dropout(config.dropout)
        self.trunk = Encoder(width, depth, heads, scan=scan, remat=remat, config=config, rngs=rngs)
        if final_norm is None:
            final_norm = config.rule.norms_branch
        self.norm = config.make_norm(width, rngs=rngs) if final_norm else init.identity
        self.head = init.linear(width, num_classes, rngs=rngs)
        for _, module in nnx.iter_modules(self):
            if isinstance(module, nnx.LayerNorm):
                module.epsilon = EPSILON

    def __call__(
        self, images: Images, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch classes"]:
        """Returns float32 logits.

        `rngs=nnx.Rngs(dropout=key)` are for dropout and stochastic depth, in training.

        Raises a UserError if the images do not have the size and channels for which the model was
        made, or if dropout or stochastic depth, in training, lack their `rngs`.
        """
        x = self.embed(images)
        if rngs is not None:  # without them, the first layer raises an error if it needs them
            x = self.dropout(x, rngs=rngs)
        x = self.trunk(x, rngs=rngs)
        pooled = x.mean(axis=1) if self.token is None else x[:, 0]
        return self.head(self.norm(pooled.astype(jnp.float32)))

    def embed(self, images: Images) -> Hidden:
        """The class token, if any, and the patches row by row, with their positions added."""
        batch, size, patch = images.shape[0], self.image_size, self.patch
        channels = self.embedding.in_features // patch**2
        check_auto(images)
        check_images(images.shape, channels, size)
        side = size // patch
        patches = images.reshape(batch, side, patch, side, patch, channels).swapaxes(2, 3)
        x = self.embedding(patches.reshape(batch, side * side, self.embedding.in_features))
        x = x.astype(trunk_dtype(x.dtype))
        if self.token is not None:
            token = jnp.broadcast_to(self.token[...], (batch, 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=1)
        return x + self.position[...][None]
