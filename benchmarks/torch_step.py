"""The training step of the PyTorch peers, timed; nothing of rezero_jax is imported.

On a GPU they multiply float32 matrices as ours do there, in TF32, or compute in bfloat16 where ours
do; on a CPU all of them compute in float32.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.worker import serve


def use_gpu() -> None:
    """Puts what PyTorch makes from now on onto the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default
        torch.backends.cudnn.allow_tf32 = True


def finish() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_bfloat16(wanted: bool = True) -> torch.autocast:
    """A context in which a GPU computes in bfloat16, if that is wanted; a CPU does not."""
    return torch.autocast("cuda", torch.bfloat16, enabled=wanted and torch.cuda.is_available())


def serve_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Sequence[Tensor] | Tensor,
    labels: Tensor,
    mode: str,
    half: bool = False,
) -> None:
    """Serves timings of zero_grad, forward, cross entropy, backward and the optimizer's step.

    Args:
      model: maps a batch to logits.
      optimizer: of its parameters.
      images, labels: the batches, used in turn.
      mode: with "compile" in it torch.compile takes the loss; with "graphs" in it also makes it a
        CUDA graph.
      half: whether to compute in bfloat16, on a GPU.
    """

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with in_bfloat16(half):
            return nn.functional.cross_entropy(model(x), y)

    graphs = "reduce-overhead" if "graphs" in mode else None
    run = torch.compile(loss, mode=graphs) if "compile" in mode else loss
    turn = itertools.cycle(range(len(images)))

    def steps(count: int) -> None:
        for _ in range(count):
            i = next(turn)
            optimizer.zero_grad()
            run(images[i], labels[i]).backward()
            optimizer.step()
        finish()

    serve(steps)
