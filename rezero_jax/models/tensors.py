"""Files of named arrays without pickle: safetensors and npz."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from rezero_jax.errors import UserError

KINDS = (".safetensors", ".npz")
DAMAGED = (SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError)


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors or .npz file; float16 and bfloat16 come as float32.

    Raises:
      UserError: no such file, one of another kind, or one that cannot be read.
    """
    path = _path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; write it in PyTorch by save_file(...)")
    try:
        if path.suffix == ".safetensors":
            return {k: numbers(v) for k, v in safetensors.numpy.load_file(path).items()}
        with zipfile.ZipFile(path):  # np.load would take other files of NumPy too
            arrays = np.load(path, allow_pickle=False)
        with arrays:
            return {name: numbers(arrays[name]) for name in arrays.files}
    except DAMAGED as error:
        raise UserError(
            f"{path} is damaged or no {path.suffix} file of arrays; write it again"
        ) from error
    except (AttributeError, TypeError) as error:  # of safetensors, for numbers of 8 bits
        raise UserError(
            f"{path} holds numbers that NumPy lacks; write it from model.float().state_dict()"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error


def save_tensors(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Writes tensors to a .safetensors or .npz file; float16 and bfloat16 go as float32.

    Raises:
      UserError: a file of another kind, or one that cannot be written.
    """
    path = _path(path)
    arrays: dict[str, Any] = row_major({name: numbers(value) for name, value in tensors.items()})
    try:
        if path.suffix == ".safetensors":
            path.write_bytes(safetensors.numpy.save(arrays))
        else:
            np.savez(path, **arrays)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); give a path in a folder that exists"
        ) from error


def row_major(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copies whose entries lie row by row: safetensors 0.8 writes other orders as if they did."""
    return {name: np.array(array, order="C") for name, array in arrays.items()}


def numbers(value: Any) -> np.ndarray:
    """An array, float32 where it had fewer bits."""
    array = np.asarray(value)
    short = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(np.float32) if short else array


def _path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix not in KINDS:
        raise UserError(
            f"{path} is no .safetensors or .npz file; write one in PyTorch by `from "
            "safetensors.torch import save_file` and `save_file(model.state_dict(), "
            '"rezero.safetensors")`'
        )
    return path
