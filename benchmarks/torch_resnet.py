"""The ResNets of the authors' CIFAR-10 experiments and their baselines in PyTorch.

This module needs benchmarks/requirements.txt, and imports nothing of rezero_jax. The networks
follow the authors' code, not the better-known versions: shortcuts have BatchNorm, and a
pre-activation network has no norm or ReLU before the head. One network differs: the authors' ReZero
network without BatchNorm keeps BatchNorm in the stem and on the shortcuts, and has no biases in the
convolutions.
"""

import torch
from torch import Tensor, nn

PREACT = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def scalar(value: float = 0.0) -> nn.Parameter:
    """A learned scalar."""
    return nn.Parameter(torch.tensor(value))


def conv(channels: int, features: int, size: int, stride: int, bias: bool) -> nn.Conv2d:
    """A convolution with same padding."""
    return nn.Conv2d(channels, features, size, stride, padding=size // 2, bias=bias)


def make_norm(channels: int, norm: bool) -> nn.Module:
    """BatchNorm, or the identity."""
    return nn.BatchNorm2d(channels) if norm else nn.Identity()


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads the channels with zeros."""

    def __init__(
        self, channels: int, features: int, stride: int, residual: str, norm: bool, shortcut: str
    ):
        super().__init__()
        self.residual = residual
        self.stride = stride
        self.added = features - channels
        self.added_before = self.added // 2 if shortcut == "centred" else 0
        self.changes_shape = stride != 1 or channels != features
        bias = not norm and residual != "fixup"
        self.conv1 = conv(channels, features, 3, stride, bias)
        self.norm1 = make_norm(features, norm)
        self.conv2 = conv(features, features, 3, 1, bias)
        self.norm2 = make_norm(features, norm)
        if self.changes_shape:
            self.shortcut_norm = make_norm(channels, norm and shortcut == "norm")
        if residual == "zero_gamma":
            assert isinstance(self.norm2, nn.BatchNorm2d)
            nn.init.zeros_(self.norm2.weight)
        if residual in ("gated", "rezero", "skipinit"):
            self.alpha = scalar()
        if residual == "fixup":
            self.bias1a, self.bias1b = scalar(), scalar()
            self.bias2a, self.bias2b = scalar(), scalar()
            self.scale = scalar(1.0)

    def shortcut(self, x: Tensor) -> Tensor:
        """x in the shape of the block's output."""
        if not self.changes_shape:
            return x
        x = self.shortcut_norm(x[:, :, :: self.stride, :: self.stride])
        before = self.added_before
        return nn.functional.pad(x, (0, 0, 0, 0, before, self.added - before))

    def forward(self, x: Tensor) -> Tensor:
        # In-place ReLUs, as in the authors' code, are faster in PyTorch.
        if self.residual == "fixup":
            u = x + self.bias1a
            fx = torch.relu_(self.conv1(u) + self.bias1b)
            fx = self.scale * self.conv2(fx + self.bias2a) + self.bias2b
            return torch.relu_(self.shortcut(u if self.changes_shape else x) + fx)
        fx = torch.relu_(self.norm1(self.conv1(x)))
        fx = self.norm2(self.conv2(fx))
        match self.residual:
            case "gated":
                return (1 - self.alpha) * self.shortcut(x) + self.alpha * torch.relu_(fx)
            case "rezero":
                return self.shortcut(x) + self.alpha * torch.relu_(fx)
            case "skipinit":
                return torch.relu_(self.shortcut(x) + self.alpha * fx)
        return torch.relu_(self.shortcut(x) + fx)


class PreactBlock(nn.Module):
    """Norm and ReLU before each convolution: two of 3x3, or a bottleneck of 1x1, 3x3, 1x1."""

    def __init__(
        self, channels: int, width: int, stride: int, residual: str, norm: bool, bottleneck: bool
    ):
        super().__init__()
        self.residual = residual
        self.bottleneck = bottleneck
        features = 4 * width if bottleneck else width
        self.changes_shape = stride != 1 or channels != features
        bias = not norm and residual != "fixup"
        self.norm1 = make_norm(channels, norm)
        self.norm2 = make_norm(width, norm)
        if bottleneck:
            self.conv1 = conv(channels, width, 1, 1, bias)
            self.conv2 = conv(width, width, 3, stride, bias)
            self.norm3 = make_norm(width, norm)
            self.conv3 = conv(width, features, 1, 1, bias)
        else:
            self.conv1 = conv(channels, width, 3, stride, bias)
            self.conv2 = conv(width, width, 3, 1, bias)
        if self.changes_shape:
            self.shortcut_conv = conv(channels, features, 1, stride, bias)
        if residual in ("gated", "rezero", "skipinit"):
            self.alpha = scalar()
        if residual == "fixup":
            self.bias1a, self.bias1b = scalar(), scalar()
            self.bias2a, self.bias2b = scalar(), scalar()
            if bottleneck:
                self.bias3a, self.bias3b, self.bias3c = scalar(), scalar(), scalar()
            else:
                self.bias2c = scalar()
            self.scale = scalar(1.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.residual == "fixup":
            u = torch.relu(x + self.bias1a) + self.bias1b
            fx = self.conv2(torch.relu(self.conv1(u) + self.bias2a) + self.bias2b)
            if self.bottleneck:
                fx = self.conv3(torch.relu(fx + self.bias3a) + self.bias3b)
            fx = self.scale * fx + (self.bias3c if self.bottleneck else self.bias2c)
        else:
            u = torch.relu(self.norm1(x))
            fx = self.conv2(torch.relu(self.norm2(self.conv1(u))))
            if self.bottleneck:
                fx = self.conv3(torch.relu(self.norm3(fx)))
        s = self.shortcut_conv(u) if self.changes_shape else x
        match self.residual:
            case "gated":
                return (1 - self.alpha) * s + self.alpha * fx
            case "rezero" | "skipinit":
                return s + self.alpha * fx
        return s + fx


class Stem(nn.Module):
    """Maps images to the channels of the first stage; `imagenet` divides the resolution by 4."""

    def __init__(self, family: str, width: int, residual: str, norm: bool, imagenet: bool):
        super().__init__()
        self.activates = family == "cifar"
        self.imagenet = imagenet
        bias = not norm and residual != "fixup"
        self.conv = conv(3, width, 7, 2, bias) if imagenet else conv(3, width, 3, 1, bias)
        if self.activates:
            self.norm = make_norm(width, norm)
        self.bias = scalar() if self.activates and residual == "fixup" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.activates:
            x = self.norm(x)
            x = torch.relu_(x if self.bias is None else x + self.bias)
        return nn.functional.max_pool2d(x, 3, 2, padding=1) if self.imagenet else x


class TorchResNet(nn.Module):
    """Stem, stages of blocks joined by a rule, mean over the pixels, linear head.

    Args:
      family: "cifar" (three stages of basic blocks) or "preact" (four of pre-activation blocks).
      depth: 6n + 2 for n blocks per stage of "cifar"; 18, 34 or 50 for "preact".
      residual: "residual", "zero_gamma" ("cifar" only), "gated", "rezero"; "skipinit" and "fixup",
        which have no BatchNorm.
      num_classes: number of logits.
      batch_norm: False removes every BatchNorm and adds biases to the convolutions.
      shortcut: "norm" (BatchNorm on shortcuts that change the shape), "subsample" (none) or
        "centred" (none, and zeros on both sides of the channels, as in the authors' notebook).
      stem: "cifar", a 3x3 convolution; or "imagenet", a 7x7 one and a pool, each of stride 2.
      width: channels of the first stage, doubled in each later stage (default: 16 or 64).
    """

    def __init__(
        self,
        family: str,
        depth: int,
        residual: str,
        num_classes: int = 10,
        *,
        batch_norm: bool = True,
        shortcut: str = "norm",
        stem: str = "cifar",
        width: int | None = None,
    ):
        super().__init__()
        norm = batch_norm and residual not in ("skipinit", "fixup")
        cifar = family == "cifar"
        blocks = (depth // 6,) * 3 if cifar else PREACT[depth]
        width = width or (16 if cifar else 64)
        expansion = 4 if depth == 50 and not cifar else 1
        self.stem = Stem(family, width, residual, norm, stem == "imagenet")
        self.stages = nn.ModuleList()
        channels = width
        for i, count in enumerate(blocks):
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                block: nn.Module
                if cifar:
                    block = CifarBlock(channels, width, stride, residual, norm, shortcut)
                else:
                    block = PreactBlock(channels, width, stride, residual, norm, expansion > 1)
                stage.append(block)
                channels = width * expansion
            self.stages.append(stage)
            width *= 2
        self.head = nn.Linear(channels, num_classes)
        self.head_bias = scalar() if residual == "fixup" else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (batch, 3, height, width) to logits (batch, num_classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = nn.functional.avg_pool2d(x, x.shape[2:]).flatten(1)
        return self.head(x if self.head_bias is None else x + self.head_bias)
