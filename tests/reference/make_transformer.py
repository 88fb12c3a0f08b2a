"""PyTorch's Transformer layers.

The ReZero layers are those of the authors' package. For each case: `state/` and `grad/` with
PyTorch's names of the parameters (of a stack, `layers.0.` and so on before them); the input `x`,
`memory` for the decoders, and their gradients `grad_x` and `grad_memory`; `mask`,
`key_padding_mask` and `memory_key_padding_mask` where PyTorch was given one, in its meaning: True
is not attended to; the output `out`. Gradients are those of sum(out * cotangent), and `cotangent`
is zero where the input is padding. Activations are (batch, time, width).
"""

from typing import Any

import torch
from rezero.transformer import RZTXDecoderLayer, RZTXEncoderLayer
from torch import Tensor, nn

from tests.reference import Stack, few_bits

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
        parameter.data = few_bits(parameter.data).double()


def random(length: int) -> Tensor:
    """Normal numbers of shape (batch, length, width)."""
    return few_bits(torch.randn(len(LENGTHS), length, WIDTH)).double()


def padding(lengths: tuple[int, ...], longest: int) -> Tensor:
    """(batch, longest): True behind the end of each sequence."""
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]


def reference(case: str) -> dict[str, Tensor]:
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
    inputs = {"x": random(LENGTH).requires_grad_()}
    if decodes:
        inputs["memory"] = random(MEMORY).requires_grad_()
    cotangent = random(LENGTH)
    if "padded" in settings:
        cotangent[masks["key_padding_mask"]] = 0.0

    named = {k if k.startswith("memory") else f"{of}_{k}": v for k, v in masks.items()}
    out = model(*(value.transpose(0, 1) for value in inputs.values()), **named).transpose(0, 1)
    (out * cotangent).sum().backward()
    tensors = {f"state/{k}": v for k, v in model.state_dict().items()}
    tensors |= inputs | masks | {"out": out, "cotangent": cotangent}
    tensors |= {f"grad/{k}": v.grad for k, v in model.named_parameters()}
    return tensors | {f"grad_{k}": v.grad for k, v in inputs.items()}
