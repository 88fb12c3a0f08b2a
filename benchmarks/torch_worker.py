"""Times training steps and generation of the PyTorch networks; see benchmarks/worker.py.

This module needs benchmarks/requirements.txt, and imports nothing of rezero_jax. On a GPU, float32
matrix products use TF32, JAX's default there, and the language models compute in bfloat16, as ours
do; a CPU computes in float32.

Modes of "mlp" and "resnet" are eager, compile (torch.compile) and compile-graphs (with CUDA
graphs). "resnet" also has channels_last, a memory format that the compiled modes use, too. Modes of
"transformer" and "generation" are official (the authors' ReZero layers), x-transformers (that
package's pre-norm decoder) and x-transformers-flash (with PyTorch's fused attention). For training,
-compile or -compile-graphs may follow. Every mode may end in -fused, which sets the optimizer's
fused=True. The official layers have no KV cache and process the whole sequence for each byte.
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":  # first, so that --help needs no PyTorch
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=("mlp", "resnet", "transformer", "generation"))
    parser.add_argument("mode")
    for name in ("depth", "width", "heads", "length", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()

import torch
from torch import Tensor, nn

from benchmarks.worker import PROMPT, serve


def use_gpu() -> None:
    """Makes a GPU PyTorch's default device, if there is one."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default
        torch.backends.cudnn.allow_tf32 = True


def finish() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_bfloat16(wanted: bool = True) -> torch.autocast:
    """A context in which a GPU computes in bfloat16, if wanted; a CPU does not."""
    return torch.autocast("cuda", torch.bfloat16, enabled=wanted and torch.cuda.is_available())


def serve_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Sequence[Tensor] | Tensor,
    targets: Tensor,
    mode: str,
    half: bool = False,
) -> None:
    """Serves timings of zero_grad, forward, cross entropy, backward and the optimizer's step.

    Args:
      model: maps a batch to logits.
      optimizer: optimizer of the model's parameters.
      inputs, targets: the batches, used in turn.
      mode: "compile" in the mode compiles the loss, and "graphs" uses CUDA graphs.
      half: whether to compute in bfloat16 on a GPU.
    """

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with in_bfloat16(half):
            return nn.functional.cross_entropy(model(x), y)

    graphs = "reduce-overhead" if "graphs" in mode else None
    run = torch.compile(loss, mode=graphs) if "compile" in mode else loss
    turn = itertools.cycle(range(len(inputs)))

    def steps(count: int) -> None:
        for _ in range(count):
            i = next(turn)
            optimizer.zero_grad()
            run(inputs[i], targets[i]).backward()
            optimizer.step()
        finish()

    serve(steps)


def serve_mlp(args: argparse.Namespace, **options: Any) -> None:
    """Serves training steps of the ReZero MLP with Adagrad on images of CIFAR-10's size."""
    from benchmarks.torch_mlp import TorchMLP

    model = TorchMLP(3072, args.width, args.depth, 10, "rezero")
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01, **options)
    labels = torch.randint(10, (16, args.batch))
    serve_training(model, optimizer, torch.randn(16, args.batch, 3072), labels, args.mode)


def serve_resnet(args: argparse.Namespace, **options: Any) -> None:
    """Serves training steps of the ReZero ResNet with SGD on images of CIFAR-10's size."""
    from benchmarks.torch_resnet import TorchResNet

    model = TorchResNet("cifar", args.depth, "rezero", width=args.width)
    images = list(torch.randn(16, args.batch, 3, 32, 32))
    if not args.mode.startswith("eager"):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = [x.to(memory_format=torch.channels_last) for x in images]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, **options
    )
    serve_training(model, optimizer, images, torch.randint(10, (16, args.batch)), args.mode)


def serve_transformer(args: argparse.Namespace, **options: Any) -> None:
    """Serves training steps of a language model with AdamW on random bytes."""
    from benchmarks.torch_transformer import VOCABULARY, make_model

    model = make_model(args.mode, args.depth, args.width, args.length, args.heads)
    model.to(torch.get_default_device())  # the official layers make their gates on the CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, **options)
    sequences = torch.randint(VOCABULARY, (16, args.batch, args.length + 1))
    inputs, targets = sequences[..., :-1], sequences[..., 1:].flatten(1)
    flat = nn.Sequential(model, nn.Flatten(0, 1))  # logits in the shape of the targets
    serve_training(flat, optimizer, inputs, targets, args.mode, half=True)


def serve_generation(args: argparse.Namespace, **_: Any) -> None:
    """Serves timings of single bytes that continue a random prompt."""
    from benchmarks.torch_transformer import VOCABULARY, generate, make_model

    model = make_model(args.mode, args.depth, args.width, args.length, args.heads)
    model.to(torch.get_default_device()).eval()
    prompt = torch.randint(VOCABULARY, (1, PROMPT))

    def steps(count: int) -> None:
        with in_bfloat16():
            generate(model, prompt, count)
        finish()

    serve(steps)


def main(args: argparse.Namespace) -> None:
    """Runs the command line."""
    workers = {
        "mlp": serve_mlp,
        "resnet": serve_resnet,
        "transformer": serve_transformer,
        "generation": serve_generation,
    }
    use_gpu()
    torch.manual_seed(0)
    workers[args.network](args, **({"fused": True} if args.mode.endswith("-fused") else {}))


if __name__ == "__main__":
    main(arguments)
