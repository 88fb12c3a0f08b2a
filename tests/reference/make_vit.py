"""Writes vit.npz: what timm's VisionTransformer computes, for tests without PyTorch.

    python tests/reference/make_vit.py    in an environment with torch 2.14 and timm 1.0

For each way of pooling, under token/ and mean/: `state/` and `grad/` with timm's names of the
parameters; the input `images` (batch, height, width, channels) and its gradient `grad_images`; the
output `logits`. Gradients are those of sum(logits * cotangent). Every parameter is random, norms
and biases too. Numbers are float32; PyTorch computes in float64, so a deviation is not its
rounding.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

SIZES: dict[str, Any] = {
    "img_size": 6,
    "patch_size": 2,
    "in_chans": 3,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2,
    "num_classes": 5,
}
POOLS: dict[str, dict[str, Any]] = {
    "token": {"global_pool": "token"},
    "mean": {"global_pool": "avg", "class_token": False},
}


def reference(pool: str) -> dict[str, np.ndarray]:
    """Everything about one way of pooling."""
    torch.manual_seed(list(POOLS).index(pool))
    model = VisionTransformer(**SIZES, **POOLS[pool])
    for name, parameter in model.named_parameters():
        low, high = (0.5, 1.5) if "norm" in name and name.endswith("weight") else (-0.5, 0.5)
        parameter.data.uniform_(low, high)
        parameter.data = parameter.data.bfloat16().float()  # few bits, for a small file
    model = model.double()
    images = torch.randn(4, 6, 6, 3).bfloat16().double().requires_grad_()
    cotangent = torch.randn(4, 5).bfloat16().double()
    logits = model(images.permute(0, 3, 1, 2))
    (logits * cotangent).sum().backward()
    tensors = {"images": images, "cotangent": cotangent, "logits": logits}
    tensors |= {"grad_images": images.grad}
    tensors |= {f"state/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"grad/{k}": v.grad for k, v in model.named_parameters()}
    return {k: v.detach().numpy().astype(np.float32) for k, v in tensors.items()}


def all_references() -> dict[str, np.ndarray]:
    """The content of vit.npz."""
    return {f"{pool}/{k}": v for pool in POOLS for k, v in reference(pool).items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("vit.npz"), **all_references())
