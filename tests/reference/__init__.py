"""Numbers that PyTorch, timm and torchscale compute, for tests without them.

    python -m tests.reference NAME

writes NAME.npz: mlp, resnet and transformer in the environment of benchmarks/requirements.txt, vit
with torch 2.14 and timm 1.0, and schemes with torch, torchscale 0.3.0 and timm 0.6.13.
`reference(case)` of make_NAME.py computes the arrays of a case, whose names are
case/what/parameter. Files are float32; where PyTorch computes in float64, a deviation is not its
rounding.
"""

import importlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

Arrays = dict[str, np.ndarray]


def all_references(name: str) -> Arrays:
    """The content of NAME.npz."""
    module = importlib.import_module(f"tests.reference.make_{name}")
    arrays = {f"{case}/{k}": v for case in module.CASES for k, v in module.reference(case).items()}
    arrays = {k: v.detach().numpy() if isinstance(v, Tensor) else v for k, v in arrays.items()}
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}


def few_bits(tensor: Tensor) -> Tensor:
    """The tensor rounded to bfloat16, for a small file."""
    return tensor.bfloat16().to(tensor.dtype)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    named: Callable[[nn.Module, str], Arrays],
) -> Arrays:
    """Updates the model for each batch; the logits, loss and gradients of the first one."""
    arrays: Arrays = {}
    for images, labels in batches:
        optimizer.zero_grad()
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        if not arrays:
            arrays = {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
            arrays |= {f"grads/{k}": v for k, v in named(model, "grad").items()}
        optimizer.step()
    return arrays


class Stack(nn.Module):
    """Layers one after another: the stacks of torch.nn give rezero's arguments they refuse."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *args, **kwargs)
        return x
