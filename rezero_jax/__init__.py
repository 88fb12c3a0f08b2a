"""ReZero in JAX and Flax: very deep residual networks whose branches are gated by alpha = 0."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rezero_jax.analysis.opened import open_run as open_run
    from rezero_jax.export import load as load
    from rezero_jax.export import save as save
    from rezero_jax.models.mlp import MLP as MLP
    from rezero_jax.models.resnet.model import ResNet as ResNet
    from rezero_jax.models.transformer.config import TransformerConfig as TransformerConfig
    from rezero_jax.models.transformer.layer import Decoder as Decoder
    from rezero_jax.models.transformer.layer import DecoderLayer as DecoderLayer
    from rezero_jax.models.transformer.layer import Encoder as Encoder
    from rezero_jax.models.transformer.layer import EncoderLayer as EncoderLayer
    from rezero_jax.models.transformer.model import Transformer as Transformer
    from rezero_jax.models.vit import ViT as ViT
    from rezero_jax.parameters import decay_mask as decay_mask
    from rezero_jax.parameters import muon_dimensions as muon_dimensions
    from rezero_jax.parameters import parameter_labels as parameter_labels
    from rezero_jax.residual import AdaLNZero as AdaLNZero
    from rezero_jax.residual import Alpha as Alpha
    from rezero_jax.residual import ReZero as ReZero
    from rezero_jax.residual import RuleConfig as RuleConfig
    from rezero_jax.stack import Stack as Stack

__version__ = "0.1.0"

# Public names are imported on first use: `import rezero_jax.residual` loads the rules alone.
_MODULES = {
    "analysis.opened": ("open_run",),
    "export": ("load", "save"),
    "models.mlp": ("MLP",),
    "models.resnet.model": ("ResNet",),
    "models.transformer.config": ("TransformerConfig",),
    "models.transformer.layer": ("Decoder", "DecoderLayer", "Encoder", "EncoderLayer"),
    "models.transformer.model": ("Transformer",),
    "models.vit": ("ViT",),
    "parameters": ("decay_mask", "muon_dimensions", "parameter_labels"),
    "residual": ("AdaLNZero", "Alpha", "ReZero", "RuleConfig"),
    "stack": ("Stack",),
}
__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
