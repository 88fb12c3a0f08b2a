"""Jacobians of many networks and layers at initialisation, as vmapped programs.

Every draw has a key of its own, so that draw i does not depend on the number of draws.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from experiments.spectra import RULES, encoder
from rezero_jax.models.transformer.attention import Attention
from rezero_jax.models.transformer.config import TransformerConfig

TOKENS, WIDTH, HEADS = 4, 16, 4  # of the authors' notebook
TOGETHER = 50  # draws in one batch


def mean_squares(rule: str, depth: int, count: int) -> Float[np.ndarray, " count"]:
    """The mean squared singular value of each of `count` encoders with its normal input.

    Net i is that of `spectra.at_initialisation` with seed i. A matrix's squared singular values
    and its squared entries have the same sum, so that no matrix is decomposed.

    Args:
      rule: a key of spectra.RULES.
    """

    def one(key: Array) -> Array:
        matrix = _jacobian(encoder(RULES[rule], depth, key), jax.random.fold_in(key, 1))
        return (matrix**2).mean() * len(matrix)

    return _each(one, count)


def layer_norm(count: int) -> Float[np.ndarray, "count values"]:
    """The singular values of LayerNorm at normal inputs, descending, over the largest."""
    return _relative(
        lambda key: _jacobian(nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=nnx.Rngs(0)), key), count
    )


def attention(count: int, *, uniform: bool) -> Float[np.ndarray, "count values"]:
    """Singular values of self-attention with new Xavier-uniform weights for each input.

    Args:
      uniform: sets queries and keys to 0, so that each token attends to all tokens equally.
    """

    def one(key: Array) -> Array:
        layer = Attention(WIDTH, HEADS, TransformerConfig(), rngs=nnx.Rngs(key))
        if uniform:
            layer.qkv[...] = layer.qkv[...].at[..., :2, :].set(0)
        return _jacobian(layer, jax.random.fold_in(key, 1))

    return _relative(one, count)


def _jacobian(model: nnx.Module, key: Array) -> Float[Array, "outputs inputs"]:
    """The Jacobian of a module from tokens to tokens, at a normal input."""
    graph, state = nnx.split(model)

    def flat(x: Array) -> Array:
        layer = nnx.merge(graph, state)
        return layer(x.reshape(1, TOKENS, WIDTH)).ravel()  # type: ignore[operator]

    return jax.jacrev(flat)(jax.random.normal(key, (1, TOKENS, WIDTH)).ravel())


def _relative(matrix: Callable[[Array], Array], count: int) -> np.ndarray:
    values = np.linalg.svd(_each(matrix, count), compute_uv=False)
    return values / values[:, :1]


def _each(of_key: Callable[[Array], Array], count: int) -> np.ndarray:
    """The function of keys 0 .. count - 1, float64."""
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    mapped = jax.jit(lambda keys: jax.lax.map(of_key, keys, batch_size=min(TOGETHER, count)))
    return np.asarray(mapped(keys), np.float64)


def means_of_ten(values: Sequence[float] | np.ndarray, draws: int = 10_000) -> np.ndarray:
    """Means of ten of the values, drawn with replacement, ascending."""
    chosen = np.random.default_rng(0).choice(np.asarray(values), (draws, 10))
    return np.sort(chosen.mean(axis=1))
