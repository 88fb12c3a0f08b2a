"""The ResNets.

For each case: parameters and running statistics; the logits, loss and gradients of the mean cross
entropy of the first batch in training mode; parameters and statistics after one update of
torch.optim.SGD for each of three batches; then the logits of the first batch in evaluation mode.
Layouts are Flax's: images NHWC, kernels HWIO; the equal blocks of a stage are stacked.
"""

import json
from typing import Any

import numpy as np
import torch

from benchmarks.torch_resnet import TorchResNet
from tests.reference import Arrays, few_bits, train

CIFAR: dict[str, Any] = {"family": "cifar", "depth": 14, "width": 2}
PREACT: dict[str, Any] = {"family": "preact", "depth": 18, "width": 1}
CASES: dict[str, dict[str, Any]] = {
    "cifar_residual": CIFAR | {"residual": "residual"},
    "cifar_zero_gamma": CIFAR | {"residual": "zero_gamma"},
    "cifar_gated": CIFAR | {"residual": "gated"},
    "cifar_rezero": CIFAR | {"residual": "rezero"},
    "cifar_skipinit": CIFAR | {"residual": "skipinit"},
    "cifar_fixup": CIFAR | {"residual": "fixup"},
    "cifar_rezero_no_norm": CIFAR | {"residual": "rezero", "batch_norm": False},
    "cifar_rezero_subsample": CIFAR | {"residual": "rezero", "shortcut": "subsample"},
    "preact_residual": PREACT | {"residual": "residual"},
    "preact_gated": PREACT | {"residual": "gated"},
    "preact_rezero": PREACT | {"residual": "rezero"},
    "preact_skipinit": PREACT | {"residual": "skipinit"},
    "preact_fixup": PREACT | {"residual": "fixup"},
    "preact_rezero_no_norm": PREACT | {"residual": "rezero", "batch_norm": False},
    "preact_rezero_imagenet": PREACT | {"residual": "rezero", "stem": "imagenet"},
    "preact50_rezero": PREACT | {"residual": "rezero", "depth": 50},
    "preact50_fixup": PREACT | {"residual": "fixup", "depth": 50},
}
CLASSES = 5
BITS = 16


def named(model: TorchResNet, of: str) -> Arrays:
    """The parameters ("data"), their gradients ("grad") or "stats" under our names."""
    arrays: Arrays = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in model.named_buffers() if of == "stats" else model.named_parameters():
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        value = (tensor if of == "stats" else getattr(tensor, of)).detach().numpy().copy()
        kind = "kernel" if value.ndim > 1 else "scale"
        leaves = {"weight": kind, "running_mean": "mean", "running_var": "var"}
        leaf = leaves.get(leaf, "rule/alpha" if leaf == "alpha" else leaf)
        value = value.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim))
        if path[:1] != ["stages"]:
            arrays["/".join([*path, leaf])] = value
            continue
        _, stage, block, *part = path
        inner = "/".join([*part, leaf])
        inner = inner.replace("shortcut_norm", "shortcut/norm").replace("shortcut_conv", "shortcut")
        if model.stages[int(stage)][int(block)].changes_shape:
            arrays[f"stages/{stage}/entry/{inner}"] = value
        else:
            stacks.setdefault(f"stages/{stage}/rest/blocks/{inner}", []).append(value)
    return arrays | {name: np.stack(values) for name, values in stacks.items()}


def randomise(model: TorchResNet) -> None:
    """Moves away from its initial value what starts at zero or one; few bits make small files."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "num_batches" in name:
            continue
        if "alpha" in name:
            tensor.data.uniform_(-0.25, 0.25)
            tensor.data += tensor.data.sign() / 8
        elif "scale" in name or "var" in name or ("norm" in name and "weight" in name):
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.ndim < 2:
            tensor.data.uniform_(-0.25, 0.25)
        elif tensor.ndim == 4:  # PyTorch's own are so small that ReLUs without norms would die
            torch.nn.init.kaiming_normal_(tensor, nonlinearity="linear")
        tensor.data = few_bits(tensor.data)


def reference(case: str) -> Arrays:
    """Everything about one case."""
    torch.manual_seed(12)  # one for which rounding puts no ReLU on its other side
    model = TorchResNet(**CASES[case], num_classes=CLASSES)
    randomise(model)
    model.double()
    side = 8 if CASES[case]["family"] == "cifar" else 16
    images = torch.randn(3, 6, side, side, 3).round().double()
    labels = torch.randint(CLASSES, (3, 6))
    arrays = {"images": images.numpy(), "labels": labels.numpy()}
    arrays |= {f"params/{k}": v for k, v in named(model, "data").items()}
    arrays |= {f"stats/{k}": v for k, v in named(model, "stats").items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    channels_first = images.permute(0, 1, 4, 2, 3)
    arrays |= train(model, optimizer, zip(channels_first, labels, strict=True), named)
    arrays |= {f"params_after/{k}": v for k, v in named(model, "data").items()}
    arrays |= {f"stats_after/{k}": v for k, v in named(model, "stats").items()}
    arrays["eval_logits"] = model.eval()(channels_first[0]).detach().numpy()
    return arrays


def packed(arrays: Arrays) -> Arrays:
    """The arrays as two, because a file of thousands of small arrays would be mostly headers.

    `layout` is JSON of the [name, type, shape] of every array; `values` has the entries of all of
    them in float32, rounded to BITS significant bits, and with the bytes of one significance
    together: row 0 the lowest byte of every entry, row 3 the highest.
    """
    layout = json.dumps([[k, v.dtype.name, v.shape] for k, v in arrays.items()])
    mantissas, exponents = np.frexp(np.concatenate([v.ravel() for v in arrays.values()]))
    values = np.ldexp(np.round(np.ldexp(mantissas, BITS)), exponents - BITS).astype("<f4")
    return {
        "layout": np.array(layout.encode()),
        "values": values.view(np.uint8).reshape(-1, 4).T.copy(),
    }
