"""Trains a network: `python train.py --config=configs/NAME.py --workdir=DIR`; see --help."""

import os
import sys
import time
from typing import TYPE_CHECKING

from launch.interrupt import end_on_interrupt

if TYPE_CHECKING:  # what takes long to import is imported once a Ctrl-C can end it
    import argparse

    from ml_collections import ConfigDict

STARTED = time.monotonic()

EXAMPLES = """\
examples:
  a ReZero network on scikit-learn's digits, in seconds:
    python train.py --config=configs/mlp.py --workdir=runs/digits
  the authors' 64-layer network on CIFAR-10, and one of its rivals:
    python train.py --config=configs/mlp.py:depth=64,dataset=cifar10 --workdir=runs/rezero
    python train.py --config=configs/mlp.py:residual=norm,depth=64,dataset=cifar10 \\
      --workdir=runs/norm
  any field of the config can be set:
    python train.py --config=configs/mlp.py --config.optim.alpha.learning_rate=0.001 \\
      --workdir=runs/slow_alpha
  the same command again resumes an interrupted run; this evaluates what it saved:
    python train.py --config=configs/mlp.py --workdir=runs/digits --mode=eval
  a config at a size that ends within a minute, to see that everything works:
    python train.py --config=configs/transformer_small.py:smoke --workdir=runs/smoke
  what a run will need, without training:
    python train.py --config=configs/transformer_enwik8.py:layers=64 --plan=h100

exit status: 0 finished; 2 a mistake in the command, the config or the workdir; 3 the loss or the
gradient stopped being finite; 4 another process of the run was lost; 130 or 143 stopped by Ctrl-C
or SIGTERM, and if training had begun, the state is saved.
"""


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    import argparse

    parser = argparse.ArgumentParser(
        description="Trains a network, or resumes an interrupted run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:KEY=VALUE,...]",
        help="a file of configs/ and its arguments, which its docstring explains",
    )
    parser.add_argument("--workdir", metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--mode",
        choices=("train", "eval"),
        default="train",
        help="eval: evaluate the newest checkpoint",
    )
    parser.add_argument(
        "--plan",
        nargs="?",
        const="here",
        metavar="ACCELERATOR",
        help="print memory, FLOPs and time of the run instead of training: as measured here, or by "
        "the peak of v4, v5e, v5p, v6e, a100, h100 or h200",
    )
    parser.add_argument(
        "--profile_steps",
        metavar="FIRST:LAST",
        help="write a trace of these updates to DIR/profile, for TensorBoard and ui.perfetto.dev",
    )
    multi = parser.add_argument_group(
        "a run of several processes",
        "On TPU slices, in Slurm and in indexed Kubernetes jobs the processes find each other. "
        "Elsewhere, start the same command in each with these flags:",
    )
    multi.add_argument(
        "--coordinator", metavar="HOST:PORT", help="a free port on the host of process 0"
    )
    multi.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")
    multi.add_argument(
        "--num_processes", type=int, metavar="N", help="how many there are; 1: run alone"
    )
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="sets a field of the config, such as --config.seed=1"
    )
    overrides = [text.removeprefix("--config.") for text in argv if text.startswith("--config.")]
    args = parser.parse_args([text for text in argv if not text.startswith("--config.")])
    if args.workdir is None and args.plan is None:
        parser.error("--workdir is missing: name the run's folder, such as --workdir=runs/first")

    if args.workdir == "":
        parser.error("--workdir= is empty (an unset variable?); name the run's folder")

    from jax.errors import JaxRuntimeError

    from rezero_jax import processes
    from rezero_jax.config import load_config
    from rezero_jax.devices import keep_compiled, pose_as
    from rezero_jax.errors import UserError

    try:
        config = load_config(args.config, overrides)
        if config.mesh.cpu_devices is not None:
            pose_as(config.mesh.cpu_devices)
        keep_compiled()
        processes.join(args.coordinator, args.process_id, args.num_processes)
        try:
            status = _run(config, args)
        except JaxRuntimeError as error:
            processes.lose(error)
        processes.leave()
        return status
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


def _run(config: "ConfigDict", args: "argparse.Namespace") -> int:
    from rezero_jax import processes
    from rezero_jax.training import loop
    from rezero_jax.training.plan import plan
    from rezero_jax.training.profile import parse_steps

    if args.plan is not None:
        account = plan(config, None if args.plan == "here" else args.plan)
        if processes.is_first():
            print(account)
        return 0
    if args.mode == "eval":
        import json

        evaluation = loop.evaluate(config, args.workdir)
        if processes.is_first():
            print(json.dumps(evaluation))
        return 0
    profile = parse_steps(args.profile_steps) if args.profile_steps else None
    try:
        final = loop.train(config, args.workdir, profile=profile)
    except loop.Diverged as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 3
    except loop.Interrupted as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 128 + error.signum
    if not processes.is_first():
        return 0
    from rezero_jax.analysis.plots.curves import write_plot

    numbers = ", ".join(f"{k} {final[k]:.4f}" for k in sorted(final) if k.startswith("eval/"))
    print(f"finished {final['steps']:,} steps: {numbers}")
    waited = time.monotonic() - STARTED
    print(
        f"time:            {waited:,.1f} s, and {final['seconds']:,.1f} s of training in all starts"
    )
    print(f"run folder:      {args.workdir}")
    print(f"learning curves: {write_plot([args.workdir])}")
    return 0


if __name__ == "__main__":
    end_on_interrupt("train.py")
    try:
        status = main(sys.argv[1:])
    except Exception:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # A failed write leaves threads of Orbax that wait for it, and Python would for them.
        os._exit(status)
