"""State dicts of PyTorch's layers and their outputs.

The file holds what transformer.npz lacks: a pre-norm decoder layer, a stack of a few layers, and a
stack with a final norm. For each model: `state/` with the state dict, `x`, for the decoder
`memory`, and the output `out` in evaluation mode. Activations are (batch, length, width). The
number of heads and the sizes of a head, the width and the hidden layer all differ, and every
parameter is random, gates, norms and biases too.
"""

from typing import Any

import numpy as np
import torch
from rezero.transformer import RZTXDecoderLayer, RZTXEncoderLayer
from torch import nn

from tests.reference import Arrays, Stack

SIZES: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 12}
INPUTS = {"x": (2, 5, 8), "memory": (2, 3, 8)}


MODELS = {
    "encoder_layer": lambda: RZTXEncoderLayer(**SIZES),
    "decoder_layer": lambda: RZTXDecoderLayer(**SIZES),
    "post_norm_decoder_layer": lambda: nn.TransformerDecoderLayer(**SIZES),
    "pre_norm_decoder_layer": lambda: nn.TransformerDecoderLayer(**SIZES, norm_first=True),
    "encoder": lambda: Stack([RZTXEncoderLayer(**SIZES) for _ in range(3)]),
    "pre_norm_encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**SIZES, norm_first=True),
        num_layers=2,
        norm=nn.LayerNorm(SIZES["d_model"]),
        enable_nested_tensor=False,
    ),
    "decoder": lambda: Stack(
        [RZTXDecoderLayer(**SIZES) for _ in range(2)], nn.LayerNorm(SIZES["d_model"])
    ),
}
CASES = ("pre_norm_decoder_layer", "encoder", "pre_norm_encoder")


def output(model: nn.Module, *inputs: np.ndarray) -> np.ndarray:
    """A model's output in evaluation mode; its input and output have the batch first."""
    model.eval()
    with torch.no_grad():
        out = model(*(torch.from_numpy(value).transpose(0, 1) for value in inputs))
    return out.transpose(0, 1).numpy()


def reference(name: str) -> Arrays:
    """Everything about one model."""
    torch.manual_seed(list(MODELS).index(name))
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    arrays = {f"state/{k}": v.numpy().copy() for k, v in model.state_dict().items()}
    inputs = {
        k: torch.randn(*v).numpy() for k, v in INPUTS.items() if k == "x" or "decoder" in name
    }
    out = output(model.double(), *(value.astype(np.float64) for value in inputs.values()))
    return arrays | inputs | {"out": out.astype(np.float32)}
