"""Singular values of the networks in Figure 4, in Appendix A and in the authors' notebooks.

Network or layer i of several is initialised from key i, whatever their number.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float
from ml_collections import ConfigDict

from rehearsal.plan import trainer_for_sizes
from rezero_jax import MLP, Encoder
from rezero_jax.analysis.singular_values import singular_values
from rezero_jax.models.resnet.batch_norm import BatchNorm
from rezero_jax.models.transformer.attention import Attention
from rezero_jax.models.transformer.config import TransformerConfig
from rezero_jax.models.transformer.model import Transformer
from rezero_jax.runs.reader import Run
from rezero_jax.training.load import load_model
from rezero_jax.training.trainer import Trainer

RULES = {"post-norm": "post_norm", "pre-norm": "pre_norm", "ReZero": "rezero"}
SQUARES = "mean squared singular value"  # a metric
NOTEBOOK, FIGURE = (12, 128), (4, 12, 64)  # layers at initialisation, there and in Figure 4a
TOKENS, WIDTH, HEADS = 4, 16, 4  # of the authors' Transformer notebook
TOGETHER = 50  # Jacobians in one batch
IMAGES, CIFAR = 30, (32, 32, 3)  # normal inputs, and their shape
BIN = 0.25  # of the histograms of log10
FLOOR = 1e-16


def at_initialisation(scale: str) -> dict[str, list[np.ndarray]]:
    """The singular values of each fresh network, (1, 64), by setting."""
    notebook, figure, count = (NOTEBOOK, FIGURE, 10) if scale != "smoke" else ((2,), (2,), 2)
    wanted = [(name, depth) for depth in notebook for name in RULES]
    wanted += [("post-norm", depth) for depth in figure]
    keys = [jax.random.key(seed) for seed in range(count)]
    inputs = [jax.random.normal(jax.random.fold_in(key, 1), (1, TOKENS, WIDTH)) for key in keys]
    found = {}
    for name, depth in dict.fromkeys(wanted):
        make = jax.jit(partial(encoder, RULES[name], depth))
        values = [singular_values(make(key), x) for key, x in zip(keys, inputs, strict=True)]
        found[f"{name}, {depth} layers"] = values
    return found


def encoder(residual: str, depth: int, key: Array) -> Encoder:
    """The notebook's network: copies of one layer with new weights but the first layer's biases."""
    options: dict[str, Any] = {"feedforward": 64, "residual": residual, "alpha_init": 0.1}
    encoder = Encoder(WIDTH, depth, heads=HEADS, **options, rngs=nnx.Rngs(key))
    blocks: Any = encoder.layers.blocks
    for linear in (blocks.feedforward.up, blocks.feedforward.down):
        linear.bias[...] = jnp.broadcast_to(linear.bias[...][:1], linear.bias.shape)
    return encoder


def mean_squares(rule: str, depth: int, count: int) -> Float[np.ndarray, " count"]:
    """The mean squared singular value of each of `count` encoders with its normal input.

    It is that of the squared entries, which have the same sum, so that no matrix is decomposed.
    """

    def one(key: Array) -> Array:
        matrix = _jacobian(encoder(RULES[rule], depth, key), jax.random.fold_in(key, 1))
        return (matrix**2).mean() * len(matrix)

    return _each(one, count)


def layer_norm(count: int) -> Float[np.ndarray, "count values"]:
    """The singular values of LayerNorm at normal inputs, descending, over the largest."""
    layer = partial(nnx.LayerNorm, WIDTH, epsilon=1e-5)
    return _relative(lambda key: _jacobian(layer(rngs=nnx.Rngs(0)), key), count)


def attention(count: int, *, uniform: bool) -> Float[np.ndarray, "count values"]:
    """Singular values of self-attention with new Xavier-uniform weights for each input.

    `uniform` sets queries and keys to 0, so that each token attends to all tokens equally.
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


def after(run: Run, step: int) -> np.ndarray:
    """Singular values of a run's network after `step` updates, (inputs, values)."""
    return _values(run, load_model(run.folder, step, run.config.get("data.dir"))[0])


def untrained(run: Run, seeds: Iterable[int]) -> list[np.ndarray]:
    """Singular values of a run's network before any update, initialised from each of the seeds."""
    trainer = load_model(run.folder, 0, run.config.get("data.dir"))[2]
    return [_values(run, model) for model in _initial(trainer, seeds)]


def resnets(config: ConfigDict, seeds: Iterable[int]) -> Iterator[nnx.Module]:
    """The ResNet of a config, as runs with each of the seeds begin; needs no data set."""
    return _initial(trainer_for_sizes(config), seeds)


def _initial(trainer: Trainer, seeds: Iterable[int]) -> Iterator[nnx.Module]:
    states = (trainer.init(seed) for seed in seeds)
    return (trainer.spec.model(state["params"], state["stats"]) for state in states)


def with_batch_statistics(net: nnx.Module) -> nnx.Module:
    """A copy whose running statistics are those of the images of `of_images`."""
    copy: Any = nnx.clone(net)
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    copy.train()
    nnx.jit(lambda net, images: net(images))(copy, _images(CIFAR))
    return copy


def of_images(net: nnx.Module) -> np.ndarray:
    """Singular values of a network in evaluation mode at normal images, (images, values)."""
    net.eval()
    return singular_values(net, _images(CIFAR))  # type: ignore[arg-type]


def _images(shape: tuple[int, ...]) -> Array:
    return jax.random.normal(jax.random.key(0), (IMAGES, *shape))


def _values(run: Run, model: nnx.Module) -> np.ndarray:
    """Singular values of a network of the run at normal inputs, in evaluation mode."""
    model.eval()
    if isinstance(model, Transformer):
        inputs = jax.random.normal(jax.random.key(0), (10, 4, run.config["model.width"]))
        return singular_values(Partial(_trunk, model), inputs)
    images = _images(CIFAR if run.config["data.name"] == "cifar10" else (8, 8, 1))
    return singular_values(model, images.reshape(IMAGES, -1) if isinstance(model, MLP) else images)


def _trunk(model: Transformer, x: Array) -> Array:
    return nnx.clone(model).trunk(x, is_causal=True)


def logs(values: np.ndarray) -> np.ndarray:
    """log10 of the values, at least that of FLOOR."""
    return np.log10(np.maximum(values, FLOOR)).ravel()


def mode(log10: np.ndarray) -> float:
    """The centre of the fullest bin, the bins centred on multiples of BIN."""
    bins, counts = np.unique(np.round(log10 / BIN), return_counts=True)
    return float(bins[counts.argmax()] * BIN + 0.0)  # turns -0 into 0


def histogram(found: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """The centres of the bins of log10, and the share of all networks' values in each."""
    log10 = np.concatenate([logs(values) for values in found])
    edges = BIN * np.arange(np.round(log10.min() / BIN) - 1, np.round(log10.max() / BIN) + 3)
    shares = np.histogram(log10, edges - BIN / 2)[0] / len(log10)
    return edges[:-1].tolist(), shares.tolist()
