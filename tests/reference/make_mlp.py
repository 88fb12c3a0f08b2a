"""The fully connected networks of the authors' notebook, in float32.

For each rule: the parameters, the logits and gradients of the mean cross entropy of one batch, and
the parameters after three updates of torch.optim.Adagrad(lr=0.01). Hidden layers are stacked, and
weights are (in, out) as in Flax.
"""

import numpy as np
import torch

from benchmarks.torch_mlp import TorchMLP
from tests.reference import Arrays, train

CASES = ("plain", "residual", "norm", "rezero")
SIZES = {"in_features": 12, "width": 6, "depth": 5, "out_features": 4}


def named(model: TorchMLP, of: str) -> Arrays:
    """The parameters ("data") or their gradients ("grad") under our names."""

    def array(parameter: torch.nn.Parameter) -> np.ndarray:
        value = getattr(parameter, of)
        return (value.T if value.ndim == 2 else value).detach().numpy().copy()

    def stack(layers: list[torch.nn.Parameter]) -> np.ndarray:
        return np.stack([array(layer) for layer in layers])

    arrays = {
        "stem/kernel": array(model.stem.weight),
        "stem/bias": array(model.stem.bias),
        "head/kernel": array(model.head.weight),
        "head/bias": array(model.head.bias),
        "trunk/blocks/linear/kernel": stack([layer.weight for layer in model.hidden]),
        "trunk/blocks/linear/bias": stack([layer.bias for layer in model.hidden]),
    }
    if model.residual == "rezero":
        arrays["trunk/blocks/rule/alpha"] = stack(list(model.alpha))
    if model.residual == "norm":
        arrays["trunk/blocks/rule/norm/scale"] = stack([norm.weight for norm in model.norms])
        arrays["trunk/blocks/rule/norm/bias"] = stack([norm.bias for norm in model.norms])
    return arrays


def reference(rule: str) -> Arrays:
    """Everything about one rule."""
    torch.manual_seed(0)
    model = TorchMLP(**SIZES, residual=rule)
    if rule == "rezero":  # away from zero, so that every gradient says something
        for alpha in model.alpha:
            alpha.data.uniform_(-0.5, 0.5)
    images = torch.randn(7, SIZES["in_features"])
    labels = torch.randint(SIZES["out_features"], (7,))
    arrays = {"images": images.numpy(), "labels": labels.numpy()}
    arrays |= {f"params/{k}": v for k, v in named(model, "data").items()}
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    arrays |= train(model, optimizer, [(images, labels)] * 3, named)
    return arrays | {f"updated/{k}": v for k, v in named(model, "data").items()}
