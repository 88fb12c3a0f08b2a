"""A whole model in two files: config.json describes it, model.safetensors has its arrays.

config.json has the SHA-256 of the other file too, so that no damage goes unnoticed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx
from safetensors import SafetensorError

from rezero_jax.errors import UserError, first_line
from rezero_jax.models.build import make_language_model, make_model
from rezero_jax.models.tensors import row_major

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load(folder: str | os.PathLike[str]) -> nnx.Module:
    """The model that `python -m rezero_jax.export` wrote to a folder, in evaluation mode.

    Neither the run nor its data set is needed, and on the same machine the outputs are those of the
    run's model to the bit. The folder's README.md shows what the model takes.

    Raises:
      UserError: the folder holds no exported model, or it is damaged or of another version.
    """
    path = epath.Path(folder).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            raise UserError(
                f"{folder} holds no exported model: there is no {name} in it; write one by python "
                f"-m rezero_jax.export WORKDIR --out={folder}"
            )
    try:
        description = dict(json.loads((path / CONFIG).read_text()))
        make = constructor(description)
        model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / CONFIG} is broken or of another version of rezero_jax "
            f"({type(error).__name__}: {first_line(error)}); export the run again"
        ) from None
    content = (path / WEIGHTS).read_bytes()
    digest = _digest(content)
    damaged = UserError(f"{path / WEIGHTS} is damaged; export the run again")
    if description.get("sha256", digest) != digest:  # earlier versions wrote none
        raise damaged
    try:
        arrays = safetensors.numpy.load(content)
    except (SafetensorError, KeyError) as error:
        raise damaged from error
    _fill(model, arrays, path / WEIGHTS)
    model.eval()
    return model


def save(model: nnx.Module, description: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Writes a model, and the description of which `constructor` makes one like it.

    Raises:
      UserError: the folder cannot be written.
    """
    path = epath.Path(folder).expanduser()
    arrays = row_major({name: leaf[...] for name, leaf in _variables(model).items()})
    try:
        path.mkdir(parents=True, exist_ok=True)
        content = safetensors.numpy.save(arrays)
        described = {**description, "sha256": _digest(content)}
        (path / WEIGHTS).write_bytes(content)
        (path / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); choose another folder"
        ) from None


def constructor(description: Mapping[str, Any]) -> Callable[[nnx.Rngs], nnx.Module]:
    """The constructor of the model that a description tells of.

    Args:
      description: "model", the fields of config.model; and for a classifier "data", with the
        "example_shape" and "num_classes" of its data set.
    """
    model = description["model"]
    if "data" not in description:
        return make_language_model(model)
    data = description["data"]
    return make_model(model, tuple(data["example_shape"]), data["num_classes"])[0]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _fill(model: nnx.Module, arrays: Mapping[str, np.ndarray], path: epath.Path) -> None:
    variables = _variables(model)
    for name in variables.keys() ^ arrays.keys():
        what = "lacks" if name in variables else "has a needless"
        raise UserError(f'{path} {what} "{name}"; export the run again')
    for name, variable in variables.items():
        if variable.shape != arrays[name].shape:
            raise UserError(
                f'"{name}" in {path} is {arrays[name].shape}, and {CONFIG} says {variable.shape}; '
                "export the run again"
            )
        variable.set_value(jnp.asarray(arrays[name], variable.dtype))


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by name, such as "trunk.blocks.linear.kernel"."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
