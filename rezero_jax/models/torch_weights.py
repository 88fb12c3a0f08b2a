"""Weights of PyTorch's Transformer layers and of timm's vision Transformers in ours, and back.

The layers are those of the authors' package `rezero` 0.1.0 (RZTXEncoderLayer, RZTXDecoderLayer) and
of torch.nn (TransformerEncoderLayer, TransformerDecoderLayer: rules "post_norm" and "pre_norm"),
alone or in stacks whose names start with layers.0., layers.1., ... The vision Transformers are
timm's VisionTransformer: rule "pre_norm", with global_pool "token", or "avg" and no class token.
In PyTorch, write the file by

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
from collections.abc import Iterable, Iterator, Mapping
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rezero_jax.errors import UserError
from rezero_jax.models.tensors import load_tensors as load_tensors
from rezero_jax.models.tensors import numbers
from rezero_jax.models.tensors import save_tensors as save_tensors
from rezero_jax.models.transformer.encoder import LayerStack
from rezero_jax.models.transformer.layer import TransformerLayer
from rezero_jax.models.vit import ViT
from rezero_jax.residual import PostNorm, PreNorm, ReZeroRule
from rezero_jax.residual.norms import DyT

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
# What timm calls otherwise than PyTorch.
TIMM = (
    ("self_attn.in_proj_", "attn.qkv."),
    ("self_attn.out_proj", "attn.proj"),
    ("linear1", "mlp.fc1"),
    ("linear2", "mlp.fc2"),
)


def from_torch(module: nnx.Module, tensors: Mapping[str, Any], prefix: str = "") -> None:
    """Copies a PyTorch state dict into a module, in place, as `nnx.update` does.

    Every parameter of the module is replaced, and keeps its dtype (float32) and device. All names
    and shapes are checked before.

    Args:
      module: an EncoderLayer, DecoderLayer, Encoder, Decoder or ViT.
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
        array, value = filled[id(param)][1], numbers(tensors[name])
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(f'"{name}" is {value.dtype}; a parameter needs floating point numbers')
        shape = place.shape(array)
        if value.shape != shape:
            raise UserError(
                f'"{name}" is {value.shape} in the state dict and {shape} in this module; '
                "make the module with the sizes of the PyTorch model"
            )
        ours = place.permuted(array)
        ours[...] = value.reshape(ours.shape)
    for param, array in filled.values():
        param.set_value(jax.device_put(array, param.get_value().sharding))


def to_torch(module: nnx.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """The module's parameters as a PyTorch state dict: `from_torch` reversed, to the bit.

    `torch.from_numpy` takes the arrays as they are. A module's gradients, which come as such a
    module, are converted in the same way.

    Args:
      module: an EncoderLayer, DecoderLayer, Encoder, Decoder or ViT.
      prefix: what the names shall start with.

    Raises:
      UserError: PyTorch's layers have no equal of the module.
    """
    tensors = {}
    for name, place in _places(module):
        array = np.asarray(place.param.get_value())
        ours = place.permuted(array).reshape(place.shape(array))
        tensors[prefix + name] = np.array(ours, order="C")
    return tensors


class _Place(NamedTuple):
    """Where a tensor of PyTorch lies: in a parameter, or in a layer of it where it is stacked."""

    param: nnx.Param
    axes: tuple[int, ...]  # their order in PyTorch
    layer: int | EllipsisType = ...
    split: tuple[int, ...] | None = None  # our array before that, if PyTorch has more axes

    def permuted(self, array: np.ndarray) -> np.ndarray:
        """A view of the tensor in the parameter's array, with PyTorch's order of the axes."""
        layer = array if self.layer is ... else array[self.layer, ...]
        return (layer if self.split is None else layer.reshape(self.split)).transpose(self.axes)

    def shape(self, array: np.ndarray) -> tuple[int, ...]:
        """PyTorch's: of `permuted`, or where nothing is split one axis, in matrices two.

        Matrices have 2 or 4 axes here, of which the last is PyTorch's last.
        """
        shape = self.permuted(array).shape
        if self.split is not None:
            return shape
        last = shape[-1:] if len(shape) % 2 == 0 else ()
        return (math.prod(shape) // math.prod(last), *last)


def _places(module: nnx.Module) -> Iterator[tuple[str, _Place]]:
    """PyTorch's name of each tensor of a module, and its place."""
    if isinstance(module, TransformerLayer):
        yield from _layer(module, ...)
    elif isinstance(module, LayerStack):
        yield from _stack(module, "layers")
        yield from _vectors("norm", module.norm)
    elif isinstance(module, ViT):
        yield from _vit(module)
    else:
        raise UserError(
            f"PyTorch's layers have no {type(module).__name__}; give an EncoderLayer, "
            "DecoderLayer, Encoder, Decoder or ViT"
        )


def _vit(model: ViT) -> Iterator[tuple[str, _Place]]:
    blocks: Any = model.trunk.layers.blocks
    embedding: Any = model.embedding
    head: Any = model.head
    rule = (blocks[0] if isinstance(blocks, nnx.List) else blocks).rules[0]
    if type(rule) is not PreNorm or model.norm is nnx.identity:
        raise UserError(
            "timm's vision Transformers are pre-norm with a final norm; make the model with "
            'residual="pre_norm" and its final norm'
        )
    patch = (model.patch, model.patch, -1, embedding.out_features)
    yield "patch_embed.proj.weight", _Place(embedding.kernel, (3, 2, 0, 1), split=patch)
    yield "patch_embed.proj.bias", _Place(embedding.bias, (0,))
    yield "pos_embed", _Place(model.position, (0, 1, 2), split=(1, *model.position.shape))
    if model.token is not None:
        yield "cls_token", _Place(model.token, (0, 1, 2), split=(1, 1, *model.token.shape))
    for name, place in _stack(model.trunk, "blocks"):
        for theirs, timms in TIMM:
            name = name.replace(theirs, timms)
        yield name, place
    yield from _vectors("fc_norm" if model.token is None else "norm", model.norm)
    yield "head.weight", _Place(head.kernel, (1, 0))
    yield "head.bias", _Place(head.bias, (0,))


def _stack(module: LayerStack, name: str) -> Iterator[tuple[str, _Place]]:
    blocks: Any = module.layers.blocks
    for i in range(module.layers.depth):
        unrolled = isinstance(blocks, nnx.List)
        places = _layer(blocks[i], ...) if unrolled else _layer(blocks, i)
        yield from ((f"{name}.{i}.{theirs}", place) for theirs, place in places)


def _vectors(name: str, norm: Any) -> Iterator[tuple[str, _Place]]:
    if isinstance(norm, DyT):
        raise UserError('PyTorch\'s layers have no DyT; make the module with norm="layer_norm"')
    if norm is not nnx.identity:
        yield f"{name}.weight", _Place(norm.scale, (0,))
        yield f"{name}.bias", _Place(norm.bias, (0,))


def _layer(layer: TransformerLayer, index: int | EllipsisType) -> Iterator[tuple[str, _Place]]:
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
    params = {
        ".".join(map(str, path)): param
        for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    for theirs, (ours, axes) in NAMES.items():
        if ours in params:
            yield theirs, _Place(params[ours], axes, index)


def _closest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f' (the closest name is "{close[0]}")' if close else ""
