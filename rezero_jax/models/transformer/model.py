"""The decoder-only language model of the paper's section 5, for bytes or any other tokens."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int, Integer

from rezero_jax.devices import check_auto
from rezero_jax.errors import UserError, check_choice, check_sizes
from rezero_jax.models import init
from rezero_jax.models.dropout import Dropout
from rezero_jax.models.options import Module, takes_options
from rezero_jax.models.transformer import attention
from rezero_jax.models.transformer.attention import Cache, Hidden, KeyMask
from rezero_jax.models.transformer.config import TransformerConfig
from rezero_jax.models.transformer.generate import generate
from rezero_jax.models.transformer.layer import Encoder
from rezero_jax.residual import trunk_dtype
from rezero_jax.residual.rule import align

Tokens = Integer[Array, "batch length"]

POSITIONS = ("sinusoidal", "learned", "rotary")
IGNORED = -100  # a target without a loss, as in PyTorch and Hugging Face's libraries
EMBEDDING_BOUND = 0.1  # of the authors' notebook
LOGITS_AT_ONCE = 2**24  # most float32 logits in memory at a time in a loss (64 MB)
UNROLLED_DECODING = 16  # deepest scanned trunk that generation unrolls


class Transformer(Module):
    """Embedding, causal layers, and a linear head that predicts the next token.

    Embedding and head start as U(-0.1, 0.1), the head's bias at 0, and the trunk as the embedding
    times sqrt(width), as in the authors' notebook. Trunk and logits are float32. The dropout also
    applies to the embedding, and bias and dtype to the head.

    Args:
      vocab_size: number of tokens; 256 for bytes.
      width: size of the trunk.
      depth: number of layers.
      heads: attention heads; divides width.
      max_len: length of the longest sequence.
      positions: "sinusoidal" (arXiv 1706.03762) or "learned" vectors added to the embedding, or
        "rotary", which sets the option of that name.
      tied: whether the head's weights are the embedding's.
      final_norm: whether a norm precedes the head, as usual with `pre_norm`.
      scan: see `rezero_jax.stack.Stack`.
      remat: see `rezero_jax.stack.Stack`.

    Raises:
      UserError: a size is below 1 or does not fit another, or a name is unknown.

    Examples:
      >>> model = Transformer(256, width=64, depth=2, heads=4, max_len=128, rngs=nnx.Rngs(0))
      >>> assert model(jnp.zeros((2, 100), jnp.int32)).shape == (2, 100, 256)
      >>> assert model.generate([list(b"Call me")], 20, rngs=nnx.Rngs(0)).shape == (1, 20)
    """

    @takes_options("residual")
    def __init__(
        self,
        vocab_size: int,
        width: int,
        depth: int,
        heads: int,
        max_len: int,
        *args: Any,
        positions: str = "sinusoidal",
        tied: bool = False,
        final_norm: bool = False,
        scan: bool = True,
        remat: str = "none",
        config: TransformerConfig = TransformerConfig(activation="gelu"),
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_sizes(vocab_size=vocab_size, max_len=max_len)
        check_choice("positions", positions, POSITIONS)
        self.vocab_size, self.max_len = vocab_size, max_len
        self.positions, self.dtype = positions, config.dtype
        self.plain = config.attention == "plain"
        self.trunk = Encoder(
            width,
            depth,
            heads,
            final_norm=final_norm,
            scan=scan,
            remat=remat,
            config=replace(config, rotary=config.rotary or positions == "rotary"),
            rngs=rngs,
        )
        uniform = init.uniform(EMBEDDING_BOUND)
        # The vocabulary is sharded along the mesh axis `model`.
        self.embedding = nnx.Param(uniform(rngs.params(), (vocab_size, width)), model_axis=-2)
        learned = positions == "learned"
        self.position = nnx.Param(uniform(rngs.params(), (max_len, width))) if learned else None
        self.head = (
            None if tied else nnx.Param(uniform(rngs.params(), (width, vocab_size)), model_axis=-1)
        )
        zeros = jnp.zeros((vocab_size,), jnp.float32)
        self.head_bias = nnx.Param(zeros, model_axis=-1) if config.bias else None
        self.dropout = Dropout(config.dropout)

    def __call__(
        self, tokens: Tokens, key_mask: KeyMask | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch length vocab"]:
        """Returns float32 logits: position i predicts token i + 1 from tokens 0 .. i.

        Args:
          tokens: integers below vocab_size, also at padding.
          key_mask: bool, False at padding, on whichever side: the other tokens then have the
            positions and the logits that they have without the padding.
          rngs: source of the dropout, in training.

        Raises:
          UserError: the tokens (see `check`) or the mask are invalid, or dropout lacks its `rngs`.
        """
        return self.logits(self.hidden(tokens, key_mask, rngs=rngs))

    def hidden(
        self, tokens: Tokens, key_mask: KeyMask | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Hidden:
        """The trunk after the last layer (and final norm), which is the head's input."""
        self.check(tokens)
        if key_mask is not None:
            attention.check_mask("a key mask", key_mask, tokens.shape)
        x = self._embed(tokens, attention.token_positions(tokens.shape[1], key_mask))
        if rngs is not None:  # without them, the first layer raises an error if dropout needs them
            x = self.dropout(x, rngs=rngs)
        return self.trunk(x, key_mask=key_mask, is_causal=True, rngs=rngs)

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """The head: float32 logits of hidden vectors."""
        kernel = self.embedding[...].T if self.head is None else self.head[...]
        logits = jnp.matmul(
            hidden.astype(self.dtype),
            kernel.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return (
            logits if self.head_bias is None else logits + align(self.head_bias[...], logits.ndim)
        )

    def losses(
        self,
        tokens: Tokens,
        targets: Tokens,
        key_mask: KeyMask | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch length"]:
        """Cross entropy (nats) of each target given the tokens up to its position.

        The loss is 0 where the target is IGNORED (-100) or `key_mask` is False. Any other target
        outside the vocabulary is a UserError, or, inside jit, which sees no values, a loss of NaN.
        More than LOGITS_AT_ONCE logits are computed in equal chunks of the length, and
        rematerialised in the backward pass.
        """
        if targets.shape != tokens.shape:
            raise UserError(f"tokens are {tokens.shape} and targets {targets.shape}; align them")
        self.check(targets, IGNORED)
        hidden = self.hidden(tokens, key_mask, rngs=rngs)
        targets = jnp.asarray(targets, jnp.int32)  # of uint8, -100 would be a token
        ignored = targets == IGNORED
        if key_mask is not None:
            ignored |= ~key_mask
        # A negative target would count from the vocabulary's end; beyond the end, it gives NaN.
        targets = jnp.where(ignored, 0, jnp.where(targets < 0, self.vocab_size, targets))

        def loss(xs: tuple[Array, Array]) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(self.logits(xs[0]), xs[1])

        length, logits = tokens.shape[1], tokens.size * self.vocab_size
        if self.plain or logits <= LOGITS_AT_ONCE:
            return jnp.where(ignored, 0.0, loss((hidden, targets)))
        # The length is chunked and not the batch, which may be sharded among devices.
        least = min(-(-logits // LOGITS_AT_ONCE), length)
        chunks = next(n for n in range(least, length + 1) if length % n == 0)
        hidden_chunks, target_chunks = (
            x.reshape(x.shape[0], chunks, length // chunks, *x.shape[2:]).swapaxes(0, 1)
            for x in (hidden, targets)
        )
        losses = jax.lax.map(jax.checkpoint(loss), (hidden_chunks, target_chunks))
        return jnp.where(ignored, 0.0, losses.swapaxes(0, 1).reshape(tokens.shape))

    def init_cache(self, batch_size: int, length: int | None = None) -> list[Cache]:
        """Empty keys and values of `length` positions (default: max_len) for `decode`."""
        return self.trunk.init_cache(batch_size, self.max_len if length is None else length)

    def decode(
        self, tokens: Tokens, cache: list[Cache], positions: Int[Array, "batch length"]
    ) -> tuple[Hidden, list[Cache]]:
        """For inference: the head's input for tokens at `positions`, and the cache with them.

        The cache has the earlier tokens; its later positions are ignored. Positions must be within
        the cache and below max_len.
        """
        return self.trunk.decode(self._embed(tokens, positions), cache, positions)

    generate = generate

    def for_decoding(self) -> "Transformer":
        """A copy in evaluation mode that decodes fast.

        A scan copies each layer's weights for every token, so a scanned trunk is unrolled if it has
        at most UNROLLED_DECODING layers; deeper trunks would compile for long.
        """
        model = nnx.clone(self)
        model.eval()
        layers = model.trunk.layers
        if not isinstance(layers.blocks, nnx.List) and layers.depth <= UNROLLED_DECODING:
            layers.blocks = nnx.List(layers.layers())
        return model

    def check(self, tokens: Array | np.ndarray, also: int = 0) -> None:
        """Raises a UserError for invalid tokens; `also` is one more valid value.

        Values are checked only outside jit; inside, a token outside the vocabulary gives NaN.
        """
        check_auto(tokens)
        if 0 in tokens.shape[1:]:
            raise UserError("the sequences are empty; give at least one token in each")
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(
                f"the model takes integer tokens (batch, length), not {tokens.dtype} of shape "
                f"{tokens.shape}; convert them"
            )
        if tokens.shape[1] > self.max_len:
            raise UserError(
                f"{tokens.shape[1]} tokens exceed max_len={self.max_len}; give fewer, or raise it"
            )
        if not isinstance(tokens, jax.core.Tracer):
            values = np.asarray(tokens)
            wrong = values[((values < 0) | (values >= self.vocab_size)) & (values != also)]
            if wrong.size:
                raise UserError(
                    f"the token {wrong[0]} is not in the vocabulary, 0 .. {self.vocab_size - 1}; "
                    "correct the tokens, or make the model with a larger vocab_size"
                )

    def _embed(self, tokens: Tokens, positions: Int[Array, "#batch length"]) -> Array:
        # A negative token is NaN, as one beyond the vocabulary is, and not one from its end.
        x = self.embedding[...].at[tokens].get(mode="fill", wrap_negative_indices=False)
        if self.position is not None:
            x = x + jnp.take(self.position[...], positions, axis=0)
        x = x * math.sqrt(x.shape[-1])
        if self.positions == "sinusoidal":
            x = x + sinusoids(positions, x.shape[-1])
        return x.astype(trunk_dtype(self.dtype))


def sinusoids(
    positions: Int[Array, "batch length"], width: int
) -> Float[Array, "batch length width"]:
    """Interleaved sin and cos of position * 10000^(-2 i / width) (arXiv 1706.03762, sec. 3.5)."""
    pairs = -(-width // 2)
    frequency = 10_000.0 ** (-2 * jnp.arange(pairs, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    both = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return both.reshape(*positions.shape, 2 * pairs)[..., :width]
