"""Compilers' estimates of our configs, and of idiomatic Flax NNX, for absent accelerators.

    make rehearse                    the table; one row takes from seconds to some minutes
    make rehearse ARGS=--set=ci      small networks, without baselines, in seconds each
    make rehearse ARGS=--set=weak    weak scaling of two networks: constant work per chip
    make rehearse ARGS=--set=rules   small networks with every residual rule, in hours
    make rehearse-gpu                the table of an H200

Each command installs the compiler in an environment. Only the compile time is measured. The other
times are the TPU compiler's estimates, or for GPUs predictions from launches and bytes. Both are
the same in every run of one version; docs/accelerators.md lists what they exclude. "kernels" is a
lower bound on the time of Pallas kernels and random bits, which the TPU's estimates exclude.
"bound" is the FLOPs of our update at the peak rate of the chips; "share" is the bound divided by
estimate plus kernels. If a cell has two numbers, the second is the baseline's
(rehearsal/baseline.py). Without the GPU, the kernels of its convolutions are unknown: the time
counts each "as a copy" of its arrays, and such times have no ratio.

A config is as in --config of train.py, followed by fields: "FILE:ARG model.dtype=bfloat16". Each
program is compiled in its own process. If the compiler rejects a program, the row shows the reason
and the exit status is 1.
"""

import json
import os
import subprocess
import sys
import time
from argparse import SUPPRESS
from collections import Counter
from typing import Any

import jax

from rehearsal.baseline_step import fitting_baseline
from rehearsal.estimate import chip_of, estimate
from rehearsal.plan import plan, trainer_for_sizes
from rehearsal.topologies import devices_of
from rezero_jax.command import parser, run
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.formatting import markdown_table, number
from rezero_jax.models.resnet.config import RULES as RESNET_RULES
from rezero_jax.residual import RULES
from rezero_jax.training.cost import update_flops

ENWIK8 = "configs/transformer_enwik8.py:depth"
BILLION = (
    "configs/transformer_small.py:depth=24,width=2048,length=2048 model.heads=16 "
    "model.positions=sinusoidal model.remat=full model.dtype=bfloat16 train.batch_size=512 "
    "train.steps_per_dispatch=1 mesh.fully_sharded=True"
)
SETS = {
    # 18 sequences per chip, or 2 of the larger model.
    "weak": [
        (f"{spec} train.batch_size={share * chips}", topology)
        for spec, share in ((f"{ENWIK8}=128", 18), (BILLION, 2))
        for topology, chips in (
            ("v5e:2x4", 8),
            ("v5e:8x8", 64),
            ("v5e:16x16", 256),
            ("2xv5e:2x4", 16),
        )
    ],
    "table": [
        (f"{ENWIK8}=12", "v5e:2x4"),
        (f"{ENWIK8}=128", "v5e:2x4"),
        (f"{ENWIK8}=128 model.dropout=0.0 model.dtype=bfloat16", "v5e:2x4"),
        ("configs/mlp.py:depth=64,dataset=cifar10", "v5e:2x2"),
        ("configs/mlp.py:depth=10000,width=150,lr=0.003,dataset=cifar10", "v5e:2x2"),
        ("configs/resnet.py:depth=56", "v5e:2x2"),
        (BILLION, "v5e:16x16"),
    ],
    "gpu": [
        (f"{config} train.steps_per_dispatch=1", "1xh200")
        for config in (
            f"{ENWIK8}=128",
            f"{ENWIK8}=128 model.dropout=0.0",
            f"{ENWIK8}=12",
            "configs/transformer_small.py:steps=500,depth=48 model.positions=sinusoidal",
            "configs/mlp.py:depth=10000,width=150,lr=0.003,dataset=cifar10",
            "configs/mlp.py:depth=64,dataset=cifar10",
            "configs/resnet.py:depth=20",
            "configs/resnet.py:depth=56",
        )
    ],
    # Every residual rule in every family and dtype.
    "rules": [
        (f"{config} model.residual={rule} model.dtype={dtype} train.batch_size=16", topology)
        for config, rules in (
            ("configs/mlp.py:smoke", set(RULES) - {"sub_norm"}),
            ("configs/resnet.py:smoke", RESNET_RULES),
            ("configs/resnet.py:smoke,family=preact", set(RESNET_RULES) - {"zero_gamma"}),
            ("configs/transformer_enwik8.py:smoke", RULES),
            ("configs/transformer_small.py:smoke", RULES),
        )
        for rule in sorted(rules)
        for dtype in ("float32", "bfloat16")
        for topology in ("v5e:2x2", "4xh100")
    ],
    "ci": [
        ("configs/transformer_enwik8.py:smoke model.dtype=bfloat16", "v5e:2x2"),
        ("configs/mlp.py:smoke train.batch_size=52", "v5e:2x2"),
        ("configs/resnet.py:smoke", "v5e:2x2"),
    ],
}
HEAD = (
    "config",
    "topology",
    "ours: update, ms",
    "kernels, ms",
    "dispatch, ms",
    "baseline: update, ms",
    "baseline / ours",
    "bound, ms",
    "share",
    "memory, GB",
    "launches",
    "bytes, GB",
    "collectives of an update",
    "compiled in, s",
)


def account(spec: str, topology: str, who: str) -> dict[str, Any]:
    """The `plan` of a config, or the corresponding entries for the baseline's update.

    Args:
      spec: the config, followed by fields.
      topology: see `topologies.devices_of`.
      who: "ours" or "baseline".

    Raises:
      UserError: config or topology are invalid, or the topology's compiler is missing.
      NotImplementedError: the config has no baseline.
      jax.errors.JaxRuntimeError: the compiler rejects the program.
    """
    name, *fields = spec.split()
    config = load_config(name, fields)
    if who == "ours":
        return plan(config, topology)
    trainer = trainer_for_sizes(config, devices_of(topology))
    started = time.perf_counter()
    _, compiled = fitting_baseline(trainer)
    seconds = time.perf_counter() - started
    found, chip = estimate(compiled), chip_of(trainer.mesh.devices.flat[0])
    return {
        "estimate": chip and found.update.seconds(chip, update_flops(trainer) / trainer.mesh.size),
        "launches": found.update.launches,
        "bytes_moved": found.update.bytes.total(),
        "bytes": {"used": found.memory},
        "compile_seconds": seconds,
    }


def account_alone(spec: str, topology: str, who: str) -> dict[str, Any]:
    """Runs `account` in a new process, to free its memory; returns {"error": text} on failure."""
    command = [sys.executable, "-m", "rehearsal.table", "--one", spec, topology, who]
    # The host's JAX must not look for a TPU just because its compiler is installed.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    ended = [f"the process ended with status {done.returncode}"]
    return {"error": (done.stdout.strip().splitlines() or ended)[-1]}


def table_row(row: dict[str, Any]) -> list[str]:
    """The cells of a row, in the order of HEAD."""
    ours, baseline = row["ours"], row["baseline"] or {}
    spec = row["config"].removeprefix("configs/")
    if "error" in ours:
        return [spec, row["topology"], ours["error"], *[""] * (len(HEAD) - 3)]
    update, kernels, bound = map(ours.get, ("estimate", "kernels_at_least", "bound_by_flops"))
    whole, other = update and update + kernels, baseline.get("estimate")
    copies = ours.get("convolutions")
    memory = [f"{who['bytes']['used'] / 1e9:.3g}" for who in (ours, baseline) if "bytes" in who]
    launches = [f"{who['launches']:,}" for who in (ours, baseline) if "launches" in who]
    moved = [number(who["bytes_moved"] / 1e9, 3) for who in (ours, baseline) if "launches" in who]
    compiled = [f"{who['compile_seconds']:.3g}" for who in (ours, baseline) if "bytes" in who]
    return [
        spec,
        row["topology"],
        _milliseconds(update) + (f", {copies:,} convolutions as copies" if copies else ""),
        _milliseconds(kernels),
        _milliseconds(ours.get("estimate_of_a_dispatch")),
        baseline.get("error") or _milliseconds(other),
        f"{other / whole:.2f}" if other and whole and not copies else "-",
        _milliseconds(bound),
        f"{bound / whole:.1%}" if whole and not copies else "-",
        " / ".join(memory),
        " / ".join(launches) or "-",
        " / ".join(moved) or "-",
        _sums(ours["collectives"]),
        " / ".join(compiled),
    ]


def _sums(collectives: list[dict[str, Any]]) -> str:
    """Sums of at least 1 MB, by kind of collective and number of participating devices."""
    sums: Counter[tuple[str, int]] = Counter()
    for one in collectives:
        sums[one["kind"], one["devices"]] += one["bytes"] * one["count"]
    texts = (
        f"{kind} {number(size / 1e6, 3)} MB among {devices}"
        for (kind, devices), size in sums.most_common()
        if size >= 1e6
    )
    return ", ".join(texts) or "-"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else number(1e3 * seconds, 3)


def _print_one(spec: str, topology: str, who: str) -> int:
    try:
        print(json.dumps(account(spec, topology, who)))
    except (UserError, NotImplementedError) as error:
        print(error)
        return 1
    except jax.errors.JaxRuntimeError as error:
        print("rejected by the compiler:", " ".join(str(error).split())[:300])
        return 1
    return 0


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    options = parser("rehearsal.table", __doc__)
    options.add_argument(
        "--set", choices=sorted(SETS), default="table", help="configs (default: table)"
    )
    options.add_argument("--configs", nargs="+", help="configs instead of a set, for v5e:2x4")
    options.add_argument("--topologies", nargs="+", help="topologies for each of the configs")
    options.add_argument("--only-ours", action="store_true", help="omit the baselines")
    options.add_argument("--one", nargs=3, help=SUPPRESS)
    args = options.parse_args(argv)
    if args.one:
        return _print_one(*args.one)
    pairs = SETS[args.set]
    if args.configs:
        pairs = [(spec, "v5e:2x4") for spec in args.configs]
    if args.topologies:
        pairs = [(spec, topology) for spec, _ in pairs for topology in args.topologies]
    alone = args.only_ours or args.set not in ("table", "gpu")
    rows: list[dict[str, Any]] = []
    for spec, topology in pairs:
        row: dict[str, Any] = {"config": spec, "topology": topology, "baseline": None}
        rows.append(row)
        for who in ("ours",) if alone else ("ours", "baseline"):
            print(f"compiling {who} of {spec} for {topology}", file=sys.stderr, flush=True)
            row[who] = account_alone(spec, topology, who)
    print(markdown_table([HEAD, *map(table_row, rows)]))
    failed = [row for row in rows if "error" in row["ours"] or "error" in (row["baseline"] or {})]
    for row in failed:
        print(f"{row['config']} does not compile for {row['topology']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main, sys.argv[1:])
