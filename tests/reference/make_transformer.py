"""Writes transformer.npz: what PyTorch's Transformer layers compute, for tests without PyTorch.

    python tests/reference/make_transformer.py    in the environment of benchmarks/requirements.txt

The ReZero layers are those of the authors' package, called one after another: in the stacks of
torch.nn they fail, for they do not know the argument `is_causal`. The norms' layers are torch.nn's.

For each case, under case/: `state/` and `grad/` with PyTorch's names of the parameters (of a stack,
`layers.0.` and so on before them); the input `x`, `memory` for the decoders, and their gradients
`grad_x` and `grad_memory`; `mask`, `key_padding_mask` and `memory_key_padding_mask` where PyTorch
was given one, in its meaning: True is not attended to; the output `out`. Gradients are those of
sum(out * cotangent), and `cotangent` is zero where the input is padding. Activations are
(batch, time, width). Numbers are float32; PyTorch computes in float64, so a deviation is not its
rounding.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rezero.transformer import RZTXDecoderLayer, RZTXEncoderLayer
from torch import Tensor, nn

WIDTH, LENGTH, MEMORY = 16, 7, 5
SIZES: dict[str, Any] = {"d_model": WIDTH, "nhead": 4, "dim_feedforward": 32, "dropout": 0.0}
LENGTHS = (7, 4, 2)  # of the sequences in a padded batch
MEMORY_LENGTHS = (3, 5, 1)
CASES: dict[str, dict[str, Any]] = {
    "encoder": {"layer": RZTXEncoderLayer},
    "encoder_gelu": {"layer": RZTXEncoderLayer, "options": {"activation": "gelu"}},
    "encoder_causal": {"layer": RZTXEncoderLayer, "causal": True},
    "encoder_padded": {"layer": RZTXEncoderLayer, "causal": True, "padded": True},
    "encoder_12": {"layer": RZTXEncoderLayer, "causal": True, "depth": 12},
    "decoder": {"layer": RZTXDecoderLayer, "causal": True, "padded": True},
    "decoder_plain": {"layer": RZTXDecoderLayer},
    "post_norm": {"layer": nn.TransformerEncoderLayer, "causal": True},
    "pre_norm": {
        "layer": nn.TransformerEncoderLayer,
        "options": {"norm_first": True},
        "causal": True,
    },
    "post_norm_decoder": {"layer": nn.TransformerDecoderLayer, "causal": True},
    "pre_norm_decoder": {"layer": nn.TransformerDecoderLayer, "options": {"norm_first": True}},
}


class Stack(nn.Module):
    """Encoder layers, one after another."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, **masks)
        return x


def simple(tensor: Tensor) -> Tensor:
    """The tensor with few significant bits, for a small file."""
    return tensor.bfloat16().double()


def randomise(model: nn.Module, first_gate: int) -> None:
    """Moves every gate, norm and bias to a value of its own, away from zero and one."""
    gates = first_gate
    for name, parameter in model.named_parameters():
        if name.endswith("resweight"):
            parameter.data.fill_((0.3 + 0.1 * gates) * (-1 if gates % 4 == 2 else 1))
            gates += 1
        elif "norm" in name and name.endswith("weight"):
            parameter.data.uniform_(0.5, 1.5)
        elif parameter.ndim == 1:
            parameter.data.uniform_(-0.5, 0.5)
        parameter.data = simple(parameter.data)


def padding(lengths: tuple[int, ...], longest: int) -> Tensor:
    """(batch, longest): True behind the end of each sequence."""
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]


def reference(case: str) -> dict[str, np.ndarray]:
    """Everything about one case."""
    number, settings = list(CASES).index(case), CASES[case]
    torch.manual_seed(number)
    make, options = settings["layer"], SIZES | settings.get("options", {})
    decodes = "decoder" in case
    of = "tgt" if decodes else "src"
    model = make(**options)
    if "depth" in settings:
        model = Stack([make(**options) for _ in range(settings["depth"])])
    randomise(model, 0 if "depth" in settings else number)

    masks = {}
    if "causal" in settings:
        masks["mask"] = torch.ones(LENGTH, LENGTH).triu(1).bool()
    if "padded" in settings:
        masks["key_padding_mask"] = padding(LENGTHS, LENGTH)
        if decodes:
            masks["memory_key_padding_mask"] = padding(MEMORY_LENGTHS, MEMORY)
    inputs = {"x": simple(torch.randn(len(LENGTHS), LENGTH, WIDTH)).requires_grad_()}
    if decodes:
        inputs["memory"] = simple(torch.randn(len(LENGTHS), MEMORY, WIDTH)).requires_grad_()
    cotangent = simple(torch.randn(len(LENGTHS), LENGTH, WIDTH))
    if "padded" in settings:
        cotangent[masks["key_padding_mask"]] = 0.0

    named = {k if k.startswith("memory") else f"{of}_{k}": v for k, v in masks.items()}
    out = model(*(value.transpose(0, 1) for value in inputs.values()), **named).transpose(0, 1)
    (out * cotangent).sum().backward()
    tensors = {f"state/{k}": v for k, v in model.state_dict().items()}
    tensors |= inputs | masks | {"out": out, "cotangent": cotangent}
    tensors |= {f"grad/{k}": v.grad for k, v in model.named_parameters()}
    tensors |= {f"grad_{k}": v.grad for k, v in inputs.items()}
    arrays = {k: v.detach().numpy() for k, v in tensors.items()}
    return {k: v if v.dtype == bool else v.astype(np.float32) for k, v in arrays.items()}


def all_references() -> dict[str, np.ndarray]:
    """The content of transformer.npz."""
    return {f"{case}/{k}": v for case in CASES for k, v in reference(case).items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("transformer.npz"), **all_references())
