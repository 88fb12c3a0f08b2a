"""Memory and time of a step at 1,000 layers, by rematerialisation and accumulation.

    python -m benchmarks.memory

Each row is a separate process that makes four updates, of a fully connected network of width 256 on
1,000 images or a Transformer of width 64 on 4 sequences of 128 bytes. "remat" is model.remat and
"microbatches" is train.accumulate. "beyond the state" subtracts the memory before the first update:
the program, the data and the state. The loss of the third update shows that the rows of a network
are equivalent.
"""

from benchmarks.worker import alone
from rezero_jax.command import parser

NETWORKS = {
    "mlp": "configs/mlp.py:depth=1000,width=256,dataset=cifar10 train.batch_size=1000",
    "transformer": "configs/transformer_small.py:depth=1000,width=64,length=128 model.heads=4 "
    "model.scan=True train.batch_size=4",
}
COMMON = "mesh.cpu_devices=None train.steps_per_dispatch=1"
SETTINGS = (("none", 1), ("full", 1), ("none", 4), ("full", 4))


def main() -> None:
    """Runs the command line."""
    parser("benchmarks.memory", __doc__).parse_args()
    print(
        "| 1,000 layers | remat | microbatches | peak, GiB | beyond the state, GiB | a step, s | "
        "loss |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, spec in NETWORKS.items():
        for remat, count in SETTINGS:
            fields = f"{COMMON} model.remat={remat} train.accumulate={count}"
            found = alone("benchmarks.jax_worker", "first", f"{spec} {fields}")
            print(
                f"| {name} | {remat} | {count} | {found['peak']:.2f} | "
                f"{found['peak'] - found['held']:.2f} | {found['later']:.1f} | "
                f"{found['loss']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
