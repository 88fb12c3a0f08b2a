"""Weights of PyTorch's Transformer layers in ours, and back.

The layers are those of the authors' package `rezero` 0.1.0 (RZTXEncoderLayer, RZTXDecoderLayer) and
of torch.nn (TransformerEncoderLayer, TransformerDecoderLayer: rules "post_norm" and "pre_norm"),
alone or in stacks whose names start with layers.0., layers.1., ... In PyTorch, write the file by

    from safetensors.torch import save_file

    save_file(model.state_dict(), "rezero.safetensors")

or, where safetensors is not installed, by

    np.savez("rezero.npz", **{k: v.float().cpu().numpy() for k, v in model.state_dict().items()})

and here

    layer = EncoderLayer(256, 4, 1024, rngs=nnx.Rngs(0))
    from_torch(layer, load_tensors("rezero.safetensors"))

The way back is `save_tensors("ours.safetensors", to_torch(layer))`, which PyTorch reads by

    model.load_state_dict(load_file("ours.safetensors"))  # of safetensors.torch

Weights do not tell the number of heads, the activation (PyTorch's default is "relu"), nor post-norm
from pre-norm: make the module with those of the PyTorch model. Ours takes (batch, length, width),
and its masks are True where PyTorch's are False.
"""

import difflib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from safetensors import SafetensorError

from rezero_jax.errors import UserError
from rezero_jax.models.transformer.encoder import LayerStack
from rezero_jax.models.transformer.layer import TransformerLayer
from rezero_jax.residual import LayerScale, PostNorm, PreNorm, ReZeroRule

KINDS = (".safetensors", ".npz")
# PyTorch's name of a tensor, ours, and the order in which PyTorch has the axes of ours. It puts all
# queries before all keys and values; ours are (width, heads, query key value, size of a head).
NAMES: dict[str, tuple[str, tuple[int, ...]]] = {
    "resweight": ("rules.0.alpha", ()),
    "self_attn.in_proj_weight": ("attention.qkv", (2, 1, 3, 0)),
    "self_attn.in_proj_bias": ("attention.qkv_bias", (1, 0, 2)),
    "self_attn.out_proj.weight": ("attention.out.kernel", (1, 0)),
    "self_attn.out_proj.bias": ("attention.out.bias", (0,)),
    "multihead_attn.in_proj_weight": ("cross_attention.qkv", (2, 1, 3, 0)),
    "multihead_attn.in_proj_bias": ("cross_attention.qkv_bias", (1, 0, 2)),
    "multihead_attn.out_proj.weight": ("cross_attention.out.kernel", (1, 0)),
    "multihead_attn.out_proj.bias": ("cross_attention.out.bias", (0,)),
    "linear1.weight": ("feedforward.up.kernel", (1, 0)),
    "linear1.bias": ("feedforward.up.bias", (0,)),
    "linear2.weight": ("feedforward.down.kernel", (1, 0)),
    "linear2.bias": ("feedforward.down.bias", (0,)),
    "norm1.weight": ("rules.0.norm.scale", (0,)),
    "norm1.bias": ("rules.0.norm.bias", (0,)),
    "norm2.weight": ("rules.1.norm.scale", (0,)),
    "norm2.bias": ("rules.1.norm.bias", (0,)),
    "norm3.weight": ("rules.2.norm.scale", (0,)),
    "norm3.bias": ("rules.2.norm.bias", (0,)),
}
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
            return {k: _numbers(v) for k, v in safetensors.numpy.load_file(path).items()}
        with zipfile.ZipFile(path):  # np.load would take other files of NumPy too
            arrays = np.load(path, allow_pickle=False)
        with arrays:
            return {name: _numbers(arrays[name]) for name in arrays.files}
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
    # Row by row: safetensors 0.8 writes other orders of the entries as if they were this one.
    arrays: dict[str, Any] = {k: np.array(_numbers(v), order="C") for k, v in tensors.items()}
    try:
        if path.suffix == ".safetensors":
            path.write_bytes(safetensors.numpy.save(arrays))
        else:
            np.savez(path, **arrays)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); give a path in a folder that exists"
        ) from error


def from_torch(module: nnx.Module, tensors: Mapping[str, Any], prefix: str = "") -> None:
    """Copies a PyTorch state dict into a module, in place, as `nnx.update` does.

    Every parameter of the module is replaced, and keeps its dtype (float32) and device. All names
    and shapes are checked before.

    Args:
      module: an EncoderLayer, DecoderLayer, Encoder or Decoder.
      tensors: arrays by PyTorch's names, as `load_tensors` returns them; a float32 state dict on
        the CPU does as well.
      prefix: what the names start with where the layers are a part of the PyTorch model, such as
        "encoder."; names that start otherwise are left alone.

    Raises:
      UserError: a name is missing or too many, a tensor has another shape or holds no floating
        point numbers, or PyTorch's layers have no equal of the module.
    """
    places = {prefix + name: place for name, place in _places(module)}
    unused = [name for name in tensors if name.startswith(prefix) and name not in places]
    how = "give that of a PyTorch model with the same layers, or make this module like it"
    for name in places:
        if name not in tensors:
            raise UserError(f'the state dict lacks "{name}"{_closest(name, unused)}; {how}')
    for name in unused:
        close = _closest(name, places)
        raise UserError(f'the state dict has "{name}", which this module lacks{close}; {how}')
    filled: dict[int, tuple[nnx.Param, np.ndarray]] = {}
    for name, place in places.items():
        param = place.param
        if id(param) not in filled:
            filled[id(param)] = param, np.empty(param.shape, param.dtype)
        ours, value = place.permuted(filled[id(param)][1]), _numbers(tensors[name])
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(f'"{name}" is {value.dtype}; a parameter needs floating point numbers')
        if value.shape != _joined(ours):
            raise UserError(
                f'"{name}" is {value.shape} in the state dict and {_joined(ours)} in this module; '
                "make the module with the sizes of the PyTorch model"
            )
        ours[...] = value.reshape(ours.shape)
    for param, array in filled.values():
        param.set_value(jax.device_put(array, param.get_value().sharding))


def to_torch(module: nnx.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """The module's parameters as a PyTorch state dict: `from_torch` reversed, to the bit.

    `torch.from_numpy` takes the arrays as they are. A module's gradients, which come as such a
    module, are converted in the same way.

    Args:
      module: an EncoderLayer, DecoderLayer, Encoder or Decoder.
      prefix: what the names shall start with.

    Raises:
      UserError: PyTorch's layers have no equal of the module.
    """
    tensors = {}
    for name, place in _places(module):
        ours = place.permuted(np.asarray(place.param.get_value()))
        tensors[prefix + name] = np.array(ours.reshape(_joined(ours)), order="C")
    return tensors


class _Place(NamedTuple):
    """Where a tensor of PyTorch lies: in a parameter, or in a layer of it where it is stacked."""

    param: nnx.Param
    axes: tuple[int, ...]  # their order in PyTorch
    layer: int | EllipsisType

    def permuted(self, array: np.ndarray) -> np.ndarray:
        """A view of the tensor in the parameter's array, with PyTorch's order of the axes."""
        layer = array if self.layer is ... else array[self.layer, ...]
        return layer.transpose(self.axes)


def _joined(permuted: np.ndarray) -> tuple[int, ...]:
    """PyTorch's shape: one axis, and in matrices, which have 2 or 4 axes here, the last one."""
    last = permuted.shape[-1:] if permuted.ndim % 2 == 0 else ()
    return (permuted.size // math.prod(last), *last)


def _places(module: nnx.Module) -> Iterator[tuple[str, _Place]]:
    """PyTorch's name of each tensor of a module, and its place."""
    if isinstance(module, TransformerLayer):
        yield from _layer(module, ...)
    elif isinstance(module, LayerStack):
        blocks: Any = module.layers.blocks
        for i in range(module.layers.depth):
            unrolled = isinstance(blocks, nnx.List)
            places = _layer(blocks[i], ...) if unrolled else _layer(blocks, i)
            yield from ((f"layers.{i}.{name}", place) for name, place in places)
        norm: Any = module.norm
        if norm is not nnx.identity:
            yield "norm.weight", _Place(norm.scale, (0,), ...)
            yield "norm.bias", _Place(norm.bias, (0,), ...)
    else:
        raise UserError(
            f"PyTorch's layers have no {type(module).__name__}; give an EncoderLayer, "
            "DecoderLayer, Encoder or Decoder"
        )


def _layer(layer: TransformerLayer, index: int | EllipsisType) -> Iterator[tuple[str, _Place]]:
    rule: Any = layer.rules[0]
    gated = isinstance(rule, ReZeroRule) and not isinstance(rule, LayerScale)
    known = gated or isinstance(rule, PreNorm | PostNorm)
    for wrong, what, how in (
        (not known, "such rule", 'residual="rezero", "post_norm" or "pre_norm"'),
        (gated and len(layer.rules) > 1, "gate for each sublayer", 'alpha_per="layer"'),
        (layer.attention.rotary, "rotary positions", "rotary=False"),
        (layer.attention.qkv.shape[-2] != 3, "heads that share keys", "kv_heads=None"),
    ):
        if wrong:
            raise UserError(f"PyTorch's layers have no {what}; make the module with {how}")
    params = {
        ".".join(map(str, path)): param
        for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    for theirs, (ours, axes) in NAMES.items():
        if ours in params:
            yield theirs, _Place(params[ours], axes, index)


def _path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix not in KINDS:
        raise UserError(
            f"{path} is no .safetensors or .npz file; write one in PyTorch by `from "
            "safetensors.torch import save_file` and `save_file(model.state_dict(), "
            '"rezero.safetensors")`'
        )
    return path


def _numbers(value: Any) -> np.ndarray:
    """An array, float32 where it had fewer bits."""
    array = np.asarray(value)
    short = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(np.float32) if short else array


def _closest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f' (the closest name is "{close[0]}")' if close else ""
