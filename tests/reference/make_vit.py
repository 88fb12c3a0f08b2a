"""timm's VisionTransformer.

For each way of pooling: `state/` and `grad/` with timm's names of the parameters; the input
`images` (batch, height, width, channels) and its gradient `grad_images`; the output `logits`.
Gradients are those of sum(logits * cotangent). Every parameter is random, norms and biases too.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.reference import few_bits

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
CASES: dict[str, dict[str, Any]] = {
    "token": {"global_pool": "token"},
    "mean": {"global_pool": "avg", "class_token": False},
}


def reference(pool: str) -> dict[str, Tensor]:
    """Everything about one way of pooling."""
    torch.manual_seed(list(CASES).index(pool))
    model = VisionTransformer(**SIZES, **CASES[pool])
    for name, parameter in model.named_parameters():
        low, high = (0.5, 1.5) if "norm" in name and name.endswith("weight") else (-0.5, 0.5)
        parameter.data.uniform_(low, high)
        parameter.data = few_bits(parameter.data)
    model = model.double()
    images = few_bits(torch.randn(4, 6, 6, 3)).double().requires_grad_()
    cotangent = few_bits(torch.randn(4, 5)).double()
    logits = model(images.permute(0, 3, 1, 2))
    (logits * cotangent).sum().backward()
    tensors = {"images": images, "cotangent": cotangent, "logits": logits}
    tensors |= {"grad_images": images.grad}
    tensors |= {f"state/{k}": v for k, v in model.state_dict().items()}
    return tensors | {f"grad/{k}": v.grad for k, v in model.named_parameters()}
