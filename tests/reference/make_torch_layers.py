"""State dicts of PyTorch's layers and their outputs.

The file has a pre-norm decoder layer, a stack of a few layers, and a stack with a final norm, which
transformer.npz lacks. For each: `state/` with the state dict, `x`, for the decoder `memory`, and
the output `out` in evaluation mode. Activations are (batch, length, width). The number of heads and
the sizes of a head, the width and the hidden layer all differ, and every parameter is random.
"""

import torch
from rezero.transformer import RZTXEncoderLayer
from torch import Tensor, nn

from tests.reference import Stack

SIZES = {"d_model": 8, "nhead": 2, "dim_feedforward": 12}
CASES = {
    "pre_norm_decoder_layer": lambda: nn.TransformerDecoderLayer(**SIZES, norm_first=True),
    "encoder": lambda: Stack([RZTXEncoderLayer(**SIZES) for _ in range(3)]),
    "pre_norm_encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**SIZES, norm_first=True),
        num_layers=2,
        norm=nn.LayerNorm(SIZES["d_model"]),
        enable_nested_tensor=False,
    ),
}


def reference(name: str) -> dict[str, Tensor]:
    """Everything about one model."""
    torch.manual_seed(3 + list(CASES).index(name))
    model = CASES[name]()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    inputs = {"x": torch.randn(2, 5, 8)}
    if "decoder" in name:
        inputs["memory"] = torch.randn(2, 3, 8)
    model.double().eval()
    out = model(*(value.double().transpose(0, 1) for value in inputs.values()))
    state = {f"state/{k}": v for k, v in model.state_dict().items()}
    return state | inputs | {"out": out.transpose(0, 1)}
