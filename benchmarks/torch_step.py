"""The training step of the PyTorch peers, timed; nothing of rezero_jax is imported."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.worker import serve


def serve_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Sequence[Tensor] | Tensor,
    labels: Tensor,
    compiled: bool,
) -> None:
    """Serves timings of zero_grad, forward, cross entropy, backward and the optimizer's step.

    Args:
      model: maps a batch to logits.
      optimizer: of its parameters.
      images, labels: the batches, used in turn.
      compiled: whether torch.compile takes the loss.
    """

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    run = torch.compile(loss) if compiled else loss
    turn = itertools.cycle(range(len(images)))

    def steps(count: int) -> None:
        for _ in range(count):
            i = next(turn)
            optimizer.zero_grad()
            run(images[i], labels[i]).backward()
            optimizer.step()

    serve(steps)
