"""Reproduces the start of the authors' ResNet notebook in PyTorch, with the same random numbers.

    python -m benchmarks.notebook_start               the first batch of each of its six nets
    python -m benchmarks.notebook_start --updates=131 also the first updates of its vanilla
                                                      ResNet-56, with its own draw and with seed 1

The notebook seeds PyTorch once, with 0. Its nets and loaders then draw in sequence: initial
weights, the order of each epoch, and a worker's seed for crops and flips. All draws happen on the
CPU, so the first batch of every net is known without training the nets before it. The program needs
CIFAR-10 in TFDS_DATA_DIR, and benchmarks/requirements.txt in addition to requirements.txt.
"""

import argparse
import random
from collections.abc import Iterator

from rezero_jax.command import parser

if __name__ == "__main__":  # first, so that --help needs no PyTorch
    options = parser("benchmarks.notebook_start", __doc__)
    text = "number of updates of the vanilla ResNet-56 (default: 0)"
    options.add_argument("--updates", type=int, default=0, help=text)
    arguments = options.parse_args()

import numpy as np
import tensorflow_datasets as tfds
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.torch_resnet import TorchResNet

BATCH, EXAMPLES = 128, 50_000
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)


# Depth, ReZero, epochs of training; then the loss (nats) and accuracy (%) that the notebook printed
# for the first batch.
NETS = (
    (20, True, 1, 2.382, 5.47),
    (20, False, 2, 3.223, 9.38),
    (56, True, 1, 2.377, 3.12),
    (56, False, 4, 11.472, 8.59),
    (110, True, 1, 2.402, 9.38),
    (110, False, 8, 12.921, 10.16),
)


def make_net(depth: int, rezero: bool) -> nn.Module:
    """Makes a net; draws PyTorch's default weights and then Kaiming's, by module."""
    residual = "rezero" if rezero else "residual"
    net = TorchResNet("cifar", depth, residual, shortcut="centred")
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return net.train()


def begin_epoch() -> tuple[int, np.ndarray]:
    """Draws the seed of the worker that augments, and the order of the examples."""
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    return seed, torch.randperm(EXAMPLES).numpy()


def pass_epochs(count: int) -> None:
    """Draws the numbers of `count` epochs and their evaluations."""
    for _ in range(count):
        begin_epoch()
        torch.empty((), dtype=torch.int64).random_()  # the seed of the evaluation's worker


def batches(data: dict[str, np.ndarray], seed: int, order: np.ndarray) -> Iterator[list[Tensor]]:
    """Yields images and labels, flipped and then cropped as by one worker of torchvision 0.5."""
    worker = random.Random(seed)
    for start in range(0, EXAMPLES, BATCH):
        chosen, images = order[start : start + BATCH], []
        for image in data["image"][chosen]:
            turned = image[:, ::-1] if worker.random() < 0.5 else image
            padded = np.pad(turned, ((4, 4), (4, 4), (0, 0)))
            row, column = worker.randint(0, 8), worker.randint(0, 8)
            crop = padded[row : row + 32, column : column + 32].astype(np.float32) / 255
            images.append((crop - MEAN) / STD)
        pixels = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
        yield [torch.from_numpy(pixels), torch.from_numpy(data["label"][chosen])]


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Loss (nats) and accuracy (%)."""
    right = (logits.argmax(1) == labels).float().mean().item()
    return functional.cross_entropy(logits, labels), 100 * right


def first_updates(net: nn.Module, data: dict[str, np.ndarray], updates: int) -> tuple[float, float]:
    """Mean training loss and accuracy (%) over the first updates of a new epoch."""
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    losses, accuracies = [], []
    for images, labels in batches(data, *begin_epoch()):
        loss, accuracy = judge(net(images), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
        accuracies.append(accuracy)
        if len(losses) == updates:
            break
    return float(np.mean(losses)), float(np.mean(accuracies))


def _print_updates(name: str, net: nn.Module, data: dict[str, np.ndarray], updates: int) -> None:
    loss, accuracy = first_updates(net, data, updates)
    print(f"  {name}: mean of {updates} updates {loss:.3f} nats, {accuracy:.2f} %", flush=True)


def read_training_images() -> dict[str, np.ndarray]:
    """CIFAR-10 in its original order, from the ids of TFDS's examples."""
    images = np.zeros((EXAMPLES, 32, 32, 3), np.uint8)
    labels = np.zeros(EXAMPLES, np.int64)
    for example in tfds.data_source("cifar10", split="train"):
        number = int(example["id"].decode().removeprefix("train_"))
        images[number], labels[number] = example["image"], example["label"]
    return {"image": images, "label": labels}


def main(args: argparse.Namespace) -> None:
    """Runs the command line."""
    data = read_training_images()
    torch.manual_seed(0)
    for depth, rezero, epochs, printed, accuracy_printed in NETS:
        net = make_net(depth, rezero)
        state = torch.get_rng_state()
        with torch.no_grad():
            images, labels = next(batches(data, *begin_epoch()))
            loss, accuracy = judge(net(images), labels)
        print(
            f"ResNet-{depth}{' + ReZero' * rezero}: first batch {loss:.3f} nats, {accuracy:.2f} %; "
            f"the notebook printed {printed} and {accuracy_printed} %",
            flush=True,
        )
        torch.set_rng_state(state)
        if args.updates and depth == 56 and not rezero:
            _print_updates("the notebook's draw", net, data, args.updates)
            torch.manual_seed(1)
            _print_updates("seed 1", make_net(depth, rezero), data, args.updates)
            return
        pass_epochs(epochs)


if __name__ == "__main__":
    main(arguments)
