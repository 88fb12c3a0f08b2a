"""Muon: the momentum of each matrix of the trunk, orthogonalised; Adam for all other parameters.

Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon) by optax, with Nesterov momentum
0.95. A matrix of n inputs and m outputs moves by 0.2 sqrt(max(n, m)) times its orthogonal factor,
so that the size of its entries' updates is about Adam's, and one learning rate and one weight decay
serve both (arXiv 2502.16982, eq. 4).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax import Array

from rezero_jax.training.state import MatrixAxes, path_text

MOMENTUM = 0.95
SIZE = 0.2  # root mean square of an update's entries


def scale_by_muon(
    matrix_axes: Mapping[str, MatrixAxes], other: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Muon's updates of the parameters in `matrix_axes`, and those of `other` for the rest.

    Args:
      matrix_axes: path -> input and output axes; along the other axes, such as that of a stack's
        layers, matrices are orthogonalised one by one.
    """

    def kinds(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "matrix" if path_text(path) in matrix_axes else "other", params
        )

    def axes(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: optax.contrib.MuonDimensionNumbers(*matrix_axes[path_text(path)]),
            params,
        )

    def size(path: Any, update: Array) -> Array:
        sides = [math.prod(update.shape[i] for i in side) for side in matrix_axes[path_text(path)]]
        return update * (SIZE * math.sqrt(max(sides)))

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=axes),
        optax.stateless(lambda updates, params: jax.tree.map_with_path(size, updates)),
    )
    return optax.partition({"matrix": muon, "other": other}, kinds)
