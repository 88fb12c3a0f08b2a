"""Converts weights from and to PyTorch's Transformer layers and timm's vision Transformers.

The converter supports the layers of the authors' package `rezero` 0.1.0 (RZTXEncoderLayer,
RZTXDecoderLayer) and of torch.nn (TransformerEncoderLayer, TransformerDecoderLayer: rules
"post_norm" and "pre_norm"), alone or in stacks whose names start with layers.0., layers.1., ...;
and timm's VisionTransformer (rule "pre_norm"), with global_pool "token", or "avg" and no class
token. In PyTorch, `save_file` and `load_file` of `safetensors.torch` write and read state dicts.

Weights do not determine the number of heads, the activation (PyTorch's default is "relu"), or
whether a layer is post-norm or pre-norm: make the module with the PyTorch model's options. Modules
here take (batch, length, width), and their masks are True where PyTorch's are False.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx
from safetensors import SafetensorError, safe_open

from rezero_jax.errors import UserError, first_line, hint_beside
from rezero_jax.models import init
from rezero_jax.models.transformer.layer import LayerStack, TransformerLayer
from rezero_jax.models.vit import ViT
from rezero_jax.residual import DyT
from rezero_jax.residual.rules import PostNorm, PreNorm, ReZeroRule

# For each axis in PyTorch, the axes of ours that it merges. Our qkv is (width, heads, query key
# value, head size); PyTorch stores all queries before all keys and values.
Axes = tuple[tuple[int, ...], ...]
SCALAR: Axes = ((),)
VECTOR: Axes = ((0,),)
MATRIX: Axes = ((1,), (0,))
QKV: Axes = ((2, 1, 3), (0,))
QKV_BIAS: Axes = ((1, 0, 2),)
# {PyTorch's name: (our name, axes)}.
NAMES: dict[str, tuple[str, Axes]] = {
    "resweight": ("rules.0.alpha", SCALAR),
    "linear1.weight": ("feedforward.up.kernel", MATRIX),
    "linear1.bias": ("feedforward.up.bias", VECTOR),
    "linear2.weight": ("feedforward.down.kernel", MATRIX),
    "linear2.bias": ("feedforward.down.bias", VECTOR),
}
for theirs, ours in (("self_attn", "attention"), ("multihead_attn", "cross_attention")):
    NAMES[f"{theirs}.in_proj_weight"] = (f"{ours}.qkv", QKV)
    NAMES[f"{theirs}.in_proj_bias"] = (f"{ours}.qkv_bias", QKV_BIAS)
    NAMES[f"{theirs}.out_proj.weight"] = (f"{ours}.out.kernel", MATRIX)
    NAMES[f"{theirs}.out_proj.bias"] = (f"{ours}.out.bias", VECTOR)
for i in range(3):
    NAMES[f"norm{i + 1}.weight"] = (f"rules.{i}.norm.scale", VECTOR)
    NAMES[f"norm{i + 1}.bias"] = (f"rules.{i}.norm.bias", VECTOR)
# (PyTorch's name, timm's name), where they differ.
TIMM = (
    ("self_attn.in_proj_", "attn.qkv."),
    ("self_attn.out_proj", "attn.proj"),
    ("linear1", "mlp.fc1"),
    ("linear2", "mlp.fc2"),
)


def from_torch(module: nnx.Module, tensors: Mapping[str, Any], prefix: str = "") -> None:
    """Copies a PyTorch state dict into a module, in place.

    Every parameter keeps its dtype (float32) and device. An error leaves the module unchanged.

    Args:
      module: an EncoderLayer, DecoderLayer, Encoder, Decoder or ViT.
      tensors: the result of `load_tensors`, or a float32 state dict on the CPU.
      prefix: prefix of the layers' names in PyTorch, such as "encoder."; other tensors are ignored.

    Raises:
      UserError: a tensor does not suit the module, or PyTorch has no equivalent layer.

    Examples:
      >>> from rezero_jax.models.weights import from_torch, load_tensors
      >>> layer = EncoderLayer(64, heads=4, rngs=nnx.Rngs(0))
      >>> from_torch(layer, load_tensors("layer.safetensors"))
    """
    places = {prefix + name: place for name, place in _places(module)}
    unused = [name for name in tensors if name.startswith(prefix) and name not in places]
    wrong = [f'lacks "{name}"' for name in places if name not in tensors][:1]
    wrong += [f'has "{name}", which this module lacks' for name in unused][:1]
    if wrong:
        raise UserError(
            f"the state dict {' and '.join(wrong)}; give one of the same layers as this module"
        )
    filled: dict[int, tuple[nnx.Param, np.ndarray]] = {}
    for name, place in places.items():
        param = place.param
        if id(param) not in filled:
            filled[id(param)] = param, np.empty(param.shape, param.dtype)
        array, value = filled[id(param)][1], np.asarray(tensors[name])
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(f'"{name}" is {value.dtype}; convert it to a floating-point dtype')
        if value.shape != place.shape(array):
            raise UserError(
                f'"{name}" is {value.shape} in the state dict and {place.shape(array)} in this '
                "module; make the module with the sizes of the PyTorch model"
            )
        ours = place.permuted(array)
        ours[...] = value.reshape(ours.shape)
    for param, array in filled.values():
        param.set_value(jax.device_put(array, param.get_value().sharding))


def to_torch(module: nnx.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """The module's parameters as a PyTorch state dict: the exact inverse of `from_torch`.

    `torch.from_numpy` accepts the arrays. Gradients with the module's structure convert too.

    Raises:
      UserError: PyTorch has no equivalent layer.

    Examples:
      >>> from rezero_jax.models.weights import save_tensors, to_torch
      >>> layer = EncoderLayer(64, heads=4, rngs=nnx.Rngs(0))
      >>> save_tensors("layer.safetensors", to_torch(layer))
    """
    tensors = {}
    for name, place in _places(module):
        array = np.asarray(place.param.get_value())
        tensors[prefix + name] = place.permuted(array).reshape(place.shape(array))
    return row_major(tensors)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a .safetensors file.

    Raises:
      UserError: the file is missing, unreadable, damaged or in another format.
    """
    with open_tensors(path) as (_, file):
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def is_file(path: epath.Path) -> bool:
    """Whether a path is a file, and not a folder or a pipe that may block a reader."""
    return path.exists() if "://" in str(path) else os.path.isfile(path)


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Any]]:
    """A .safetensors file, as a local path and as safetensors' reader of single tensors.

    The reader has checked the header against the file's size, and has read no tensor. Raises a
    UserError as `load_tensors`, also for errors of the reader.
    """
    file = epath.Path(path).expanduser()
    with contextlib.ExitStack() as stack:
        try:
            if not is_file(file):
                hint = hint_beside(Path(file), "name another file")
                raise UserError(f"{file} is missing or not a file; {hint}")
            if "://" in str(file):  # in a bucket
                copy = stack.enter_context(tempfile.NamedTemporaryFile())
                copy.write(file.read_bytes())
                copy.flush()
                file = epath.Path(copy.name)
            yield Path(file), stack.enter_context(safe_open(file, "np"))
        except (SafetensorError, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is damaged, not a safetensors file, or has a dtype that NumPy lacks "
                f"({first_line(error)}); write it in PyTorch with "
                "safetensors.torch.save_file(model.float().state_dict(), path)"
            ) from error


def save_tensors(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Writes tensors to a .safetensors file."""
    Path(path).expanduser().write_bytes(safetensors.numpy.save(row_major(tensors)))


def row_major(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Row-major copies of arrays; safetensors 0.8 ignores the memory order of an array."""
    return {name: np.array(array, order="C") for name, array in arrays.items()}


def variables_of(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Variables of a module by name, such as "trunk.blocks.linear.kernel"."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}


class _Place(NamedTuple):
    """Location of a PyTorch tensor: a parameter, or one layer of a stacked parameter."""

    param: nnx.Param
    axes: Axes
    layer: tuple[int, ...] = ()  # index on the parameter's layer axis, if it is stacked
    split: tuple[int, ...] | None = None  # shape of our array with PyTorch's additional axes

    def permuted(self, array: np.ndarray) -> np.ndarray:
        """A view of the tensor in the parameter's array, in PyTorch's axis order."""
        index: tuple[Any, ...] = (*self.layer, ...)  # a view, even of an array without axes
        layer = array[index].reshape(self.split or array[index].shape)
        return layer.transpose(tuple(chain(*self.axes)))

    def shape(self, array: np.ndarray) -> tuple[int, ...]:
        """The tensor's shape in PyTorch."""
        sizes = iter(self.permuted(array).shape)
        return tuple(math.prod(islice(sizes, len(merged))) for merged in self.axes)


def _places(module: nnx.Module) -> Iterator[tuple[str, _Place]]:
    if isinstance(module, TransformerLayer):
        yield from _layer(module, ())
    elif isinstance(module, LayerStack):
        yield from _stack(module, "layers")
        yield from _vectors("norm", module.norm)
    elif isinstance(module, ViT):
        yield from _vit(module)
    else:
        raise UserError(
            f"PyTorch has no equivalent of {type(module).__name__}; give an EncoderLayer, "
            "DecoderLayer, Encoder, Decoder or ViT"
        )


def _vit(model: ViT) -> Iterator[tuple[str, _Place]]:
    blocks: Any = model.trunk.layers.blocks
    embedding: Any = model.embedding
    head: Any = model.head
    rule = (blocks[0] if isinstance(blocks, nnx.List) else blocks).rules[0]
    if type(rule) is not PreNorm or model.norm is init.identity:
        raise UserError('timm has residual="pre_norm" and a final norm; make the model with both')
    patch = (model.patch, model.patch, -1, embedding.out_features)
    axes = ((3,), (2,), (0,), (1,))
    yield "patch_embed.proj.weight", _Place(embedding.kernel, axes, split=patch)
    yield "patch_embed.proj.bias", _Place(embedding.bias, VECTOR)
    yield "pos_embed", _Place(model.position, ((), (0,), (1,)))
    if model.token is not None:
        yield "cls_token", _Place(model.token, ((), (), (0,)))
    for name, place in _stack(model.trunk, "blocks"):
        for theirs, timms in TIMM:
            name = name.replace(theirs, timms)
        yield name, place
    yield from _vectors("fc_norm" if model.token is None else "norm", model.norm)
    yield "head.weight", _Place(head.kernel, MATRIX)
    yield "head.bias", _Place(head.bias, VECTOR)


def _stack(module: LayerStack, name: str) -> Iterator[tuple[str, _Place]]:
    blocks: Any = module.layers.blocks
    unrolled = isinstance(blocks, nnx.List)
    for i in range(module.layers.depth):
        places = _layer(blocks[i], ()) if unrolled else _layer(blocks, (i,))
        yield from ((f"{name}.{i}.{theirs}", place) for theirs, place in places)


def _vectors(name: str, norm: Any) -> Iterator[tuple[str, _Place]]:
    if isinstance(norm, DyT):
        raise UserError('PyTorch\'s layers have no DyT; make the module with norm="layer_norm"')
    if norm is not init.identity:
        yield f"{name}.weight", _Place(norm.scale, VECTOR)
        yield f"{name}.bias", _Place(norm.bias, VECTOR)


def _layer(layer: TransformerLayer, index: tuple[int, ...]) -> Iterator[tuple[str, _Place]]:
    rule: Any = layer.rules[0]
    gated = type(rule) is ReZeroRule
    normed = type(rule) in (PreNorm, PostNorm)
    for wrong, what, how in (
        (not gated and not normed, "such rule", 'residual="rezero", "post_norm" or "pre_norm"'),
        (normed and isinstance(rule.norm, DyT), "such norm", 'norm="layer_norm"'),
        (gated and len(layer.rules) > 1, "gate for each sublayer", 'alpha_per="layer"'),
        (layer.attention.rotary, "rotary positions", "rotary=False"),
        (layer.attention.qkv.shape[-2] != 3, "heads that share keys", "kv_heads=None"),
    ):
        if wrong:
            raise UserError(f"PyTorch's layers have no {what}; make the module with {how}")
    params: dict[str, Any] = variables_of(layer)
    for theirs, (ours, axes) in NAMES.items():
        if ours in params:
            yield theirs, _Place(params[ours], axes, index)
