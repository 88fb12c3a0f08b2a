"""Updates of whole configs on this machine's devices: ours and a network by the book, in turns.

    python -m benchmarks.updates
    python -m benchmarks.updates --configs "configs/resnet.py:depth=110 train.batch_size=512"

An update is that of train.py, on random data of the shape that the config asks for, without the
host's input: images are resident on the device. The peer is that of rehearsal/by_the_book.py,
handed its batch; some configs have none. A config is as in --config of train.py, with fields after
it. Both take turns in one process, ours by whole dispatches.

"bound" is what the floating-point operations of the model take at the peak rate of the devices, and
"MFU" the bound over our time; recomputation is not counted (arXiv 2204.02311, B). "holds" is what
the compiler allots to the program. Run it on an otherwise idle machine.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.mlp import random_images
from benchmarks.step import updates_of
from benchmarks.transformer import random_text
from benchmarks.worker import SHORTEST, milliseconds, spread
from rehearsal.by_the_book_step import Peer
from rehearsal.chips import chip_of
from rehearsal.estimate import estimate
from rehearsal.plan import compile_dispatch
from rezero_jax.config import load_config
from rezero_jax.data import Dataset, Text, load, stand_in
from rezero_jax.devices import cache_compilations, set_cpu_devices
from rezero_jax.errors import UserError
from rezero_jax.formatting import markdown_table, number
from rezero_jax.training.cost import model_flops
from rezero_jax.training.trainer import Trainer

EXAMPLES = 2560
ENWIK8 = "configs/transformer_enwik8.py:layers"
CONFIGS = (
    "configs/mlp.py:depth=64,dataset=cifar10",
    "configs/mlp.py:depth=10000,width=150,lr=0.003,dataset=cifar10",
    "configs/resnet.py:depth=56",
    f"{ENWIK8}=12",
    f"{ENWIK8}=12 model.dropout=0.0",
    f"{ENWIK8}=128",
    f"{ENWIK8}=128 model.dropout=0.0",
)
HEAD = (
    "config",
    "ours, ms",
    "peer, ms",
    "peer / ours",
    "bound, ms",
    "MFU",
    "holds, GB (peer)",
    "compiled in, s (peer)",
)


def random_data(config: ConfigDict) -> Dataset | Text:
    """Random data in the shape of what config.data names: speed does not depend on its content."""
    if config.model.name == "transformer":
        return random_text(config.data.length)
    named = stand_in(config.data) or load(config.data)
    assert isinstance(named, Dataset)
    return random_images(named.example_shape, named.num_classes, EXAMPLES)


def steps_of_ours(
    config: ConfigDict, data: Dataset | Text
) -> tuple[Callable[[int], None], dict[str, float]]:
    """steps(n), which waits for n updates, and what the program costs."""
    trainer = Trainer(config, data)
    chip = chip_of(trainer.mesh.devices.flat[0])
    started = time.perf_counter()
    compiled = compile_dispatch(trainer)
    cost = {"compiled": time.perf_counter() - started, "holds": estimate(compiled).memory}
    if chip:
        cost["bound"] = model_flops(trainer) / (trainer.mesh.size * chip.flops)
    return updates_of(trainer), cost


def steps_of_peer(
    config: ConfigDict, data: Dataset | Text
) -> tuple[Callable[[int], None], dict[str, float]]:
    """The same of the peer, on a batch of the shapes of `data`.

    Raises:
      NotImplementedError: the config has none.
    """
    shape, classes = getattr(data, "example_shape", ()), getattr(data, "num_classes", 0)
    peer = Peer(config, jax.devices(), shape, classes)
    started = time.perf_counter()
    update = peer.compile()
    cost = {"compiled": time.perf_counter() - started, "holds": estimate(update).memory}
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        whole = np.issubdtype(leaf.dtype, np.integer)
        drawn = (
            rng.integers(classes or 256, size=leaf.shape) if whole else rng.normal(size=leaf.shape)
        )
        return jax.device_put(jnp.asarray(drawn, leaf.dtype), leaf.sharding)

    state, batch = peer.init(), jax.tree.map(draw, peer.batch)

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, loss = update(state, batch)
        jax.block_until_ready((state, loss))

    return steps, cost


def measure(spec: str, turns: int, peer: bool) -> dict[str, Any]:
    """The seconds of an update of ours and of the peer in each turn, and what each costs."""
    name, *fields = spec.split()
    endless = {"train.epochs": None, "train.steps": 10**7}
    fields = [*fields, *(f"{key}={value}" for key, value in endless.items())]
    config = load_config(name, fields)
    if config.mesh.cpu_devices:
        set_cpu_devices(config.mesh.cpu_devices)
    cache_compilations()
    data = random_data(config)
    ours, cost = steps_of_ours(config, data)
    found: dict[str, Any] = {"config": spec, "device": jax.devices()[0].device_kind}
    found["ours"] = cost | {"seconds": []}
    found["peer"] = None
    served = {"ours": ours}
    with contextlib.suppress(NotImplementedError):
        if peer:
            served["peer"], cost = steps_of_peer(config, data)
            found["peer"] = cost | {"seconds": []}
    for steps in served.values():
        steps(config.train.steps_per_dispatch)
    started, count = time.perf_counter(), config.train.steps_per_dispatch
    ours(count)
    count *= max(1, round(SHORTEST / (time.perf_counter() - started)))
    for _ in range(turns):
        for who, steps in served.items():
            started = time.perf_counter()
            steps(count)
            found[who]["seconds"].append((time.perf_counter() - started) / count)
    return found


def table_row(row: dict[str, Any]) -> list[str]:
    """A row of the table under HEAD."""
    ours, peer = row["ours"], row["peer"]
    median, bound = statistics.median(ours["seconds"]), ours.get("bound")
    ratios = [b / a for a, b in zip(ours["seconds"], peer["seconds"], strict=True)] if peer else []

    def of_both(key: str, scale: float) -> str:
        own = number(ours[key] * scale, 3)
        return f"{own} ({number(peer[key] * scale, 3)})" if peer else own

    return [
        row["config"].removeprefix("configs/"),
        milliseconds(ours["seconds"]),
        milliseconds(peer["seconds"]) if peer else "-",
        spread(ratios) if peer else "-",
        milliseconds([bound]) if bound else "-",
        f"{bound / median:.1%}" if bound else "-",
        of_both("holds", 1e-9),
        of_both("compiled", 1),
    ]


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--turns", type=int, default=7, help="turns of each")
    parser.add_argument("--only-ours", action="store_true", help="no peers")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        try:
            print(json.dumps(measure(args.one, args.turns, not args.only_ours)))
        except (UserError, jax.errors.JaxRuntimeError) as error:
            print(" ".join(str(error).split())[:300])
            return 1
        return 0
    rows, failed = [], False
    for spec in args.configs:  # each in a process of its own, whose memory is given back
        command = [sys.executable, "-m", "benchmarks.updates", f"--turns={args.turns}"]
        command += ["--only-ours"] if args.only_ours else []
        done = subprocess.run([*command, "--one", spec], stdout=subprocess.PIPE, text=True)
        last = (done.stdout.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
        print(f"{spec}: {last}", file=sys.stderr, flush=True)
        if done.returncode:
            failed = True
        else:
            rows.append(json.loads(last))
    print(markdown_table([HEAD, *map(table_row, rows)]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
