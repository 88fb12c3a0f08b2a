"""Training loss by the dtypes of computation and trunk.

    python -m benchmarks.precision mlp --dir=DATA     64 layers of width 256 on CIFAR-10
    python -m benchmarks.precision transformer        12 layers of width 128 on Python's sources

Every row trains the same networks on the same batches, one per seed. The loss is the mean over the
last updates. Only this benchmark has a bfloat16 trunk.
"""

import statistics
import time
from itertools import islice

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.worker import print_head, print_row
from rezero_jax import data
from rezero_jax.command import parser
from rezero_jax.config import load_config
from rezero_jax.residual import rule
from rezero_jax.training.trainer import Trainer

CONFIGS = {
    "mlp": "configs/mlp.py:depth=64,dataset=cifar10",
    "transformer": "configs/transformer_small.py:depth=12",
}
ROWS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
LAST = 50  # number of updates whose loss is averaged


def final_loss(config: ConfigDict, dataset: data.Dataset | data.Text, trunk: str) -> float:
    """The mean training loss of the last updates with this trunk."""
    rule.TRUNK_DTYPE = getattr(jnp, trunk)
    trainer = Trainer(config, dataset)
    state, batches = trainer.init(), trainer.batches(0)
    losses: list[float] = []
    while some := list(islice(batches, config.train.steps_per_dispatch)):
        state, report = trainer.dispatch(state, some)
        losses += np.asarray(report["loss"])[: len(some)].tolist()
    return statistics.mean(losses[-LAST:])


def main() -> None:
    """Runs the command line."""
    options = parser("benchmarks.precision", __doc__)
    options.add_argument("network", choices=CONFIGS, help="family to train")
    options.add_argument("--dir", help="folder of the prepared data sets (default: TFDS's)")
    options.add_argument("--steps", type=int, default=300, help="updates per run (default: 300)")
    options.add_argument("--seeds", type=int, default=3, help="runs per row (default: 3)")
    options.add_argument(
        "--fields", nargs="*", default=[], help="config fields, as KEY=VALUE (default: none)"
    )
    args = options.parse_args()
    fields = [
        "train.epochs=None",
        f"train.steps={args.steps}",
        "eval.every_epochs=None",
        "eval.every_steps=None",
        *args.fields,
    ]
    config = load_config(CONFIGS[args.network], fields)
    config.data.dir = args.dir
    dataset = data.load(config.data)
    print_head("computation", "trunk", "loss: mean (each seed)", "s a run")
    for dtype, trunk in ROWS:
        config.model.dtype = dtype
        losses, started = [], time.perf_counter()
        for config.seed in range(args.seeds):
            losses.append(final_loss(config, dataset, trunk))
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        seconds = (time.perf_counter() - started) / args.seeds
        print_row(dtype, trunk, f"{statistics.mean(losses):.4f} ({each})", f"{seconds:.0f}")


if __name__ == "__main__":
    main()
