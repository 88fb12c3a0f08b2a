"""The MLP of the authors' notebook in idiomatic PyTorch.

This module needs benchmarks/requirements.txt, and imports nothing of rezero_jax.
"""

import torch
from torch import Tensor, nn


class TorchMLP(nn.Module):
    """Linear, ReLU, `depth` hidden layers joined by a rule of the paper's Table 1, linear head."""

    def __init__(self, in_features: int, width: int, depth: int, out_features: int, residual: str):
        super().__init__()
        self.residual = residual
        self.stem = nn.Linear(in_features, width)
        layers = [nn.Linear(width, width) for _ in range(depth)]
        self.hidden = nn.ModuleList(layers)
        self.head = nn.Linear(width, out_features)
        nn.init.kaiming_normal_(self.stem.weight, mode="fan_in", nonlinearity="relu")
        for layer in layers:
            gain = (0.25 if residual == "residual" else 2.0) ** 0.5
            nn.init.xavier_normal_(layer.weight, gain=gain)
        if residual == "rezero":
            self.alpha = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(depth))
        if residual == "norm":
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_features) to logits (batch, out_features)."""
        x = torch.relu(self.stem(x))
        for i, layer in enumerate(self.hidden):
            fx = torch.relu(layer(x))
            match self.residual:
                case "plain":
                    x = fx
                case "residual":
                    x = x + fx
                case "norm":
                    x = self.norms[i](fx)
                case "rezero":
                    x = x + self.alpha[i] * fx
        return self.head(x)
