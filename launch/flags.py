"""The flags of train.py."""

import argparse

from rezero_jax import command

EXAMPLES = """\
examples:
  train a ReZero network on scikit-learn's digits within seconds:
    python train.py --config=configs/mlp.py --workdir=runs/digits
  train the authors' 64-layer network on CIFAR-10, and one of its baselines:
    python train.py --config=configs/mlp.py:depth=64,dataset=cifar10 --workdir=runs/rezero
    python train.py --config=configs/mlp.py:residual=norm,depth=64,dataset=cifar10 \\
      --workdir=runs/norm
  set any field of the config:
    python train.py --config=configs/mlp.py --config.optim.alpha.learning_rate=0.001 \\
      --workdir=runs/slow_alpha
  evaluate the newest checkpoint of a run, and an older one:
    python train.py --mode=eval --workdir=runs/digits
    python train.py --mode=eval --workdir=runs/digits --step=1000
  run a tiny version of a config, to check within a minute that everything works:
    python train.py --config=configs/transformer_small.py:smoke --workdir=runs/smoke
  print memory, FLOPs and time of a run on these devices, or on an absent TPU:
    python train.py --config=configs/transformer_enwik8.py:depth=64 --plan
    python train.py --config=configs/transformer_enwik8.py:depth=64 --plan=v5e:2x4

exit status:
  0         the run is finished
  2         the command, the config or the workdir is invalid
  3         the run diverged: the loss, a gradient or a parameter is not finite
  4         another process of the run was lost or did not connect, or the bucket does not respond
  134       JAX aborted, because another process of the run was unresponsive
  130, 143  Ctrl-C or SIGTERM stopped the run; if training had begun, its state is saved
After 4, 130, 134 and 143 the same command resumes the run.
"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line into its flags and the texts "KEY=VALUE" of --config.KEY=VALUE."""
    parser = _parser()
    overrides = [text.removeprefix("--config.") for text in argv if text.startswith("--config.")]
    args = parser.parse_args([text for text in argv if not text.startswith("--config.")])
    if args.config is None and (args.mode != "eval" or args.plan is not None):
        parser.error("--config is missing: name a config file, such as --config=configs/mlp.py")
    if args.workdir is None and args.plan is None:
        parser.error("--workdir is missing: name the run's folder, such as --workdir=runs/first")
    if args.plan_json and args.plan is None:
        parser.error("--plan_json needs --plan, such as --plan=v5e:2x4")
    if args.step is not None and args.mode != "eval":
        parser.error("--step chooses a checkpoint to evaluate; add --mode=eval")
    if args.allow and args.mode != "eval":
        parser.error("--allow is for the config of a run to evaluate; leave it out")
    if args.workdir == "":
        parser.error("--workdir= is empty (an unset variable?); name the run's folder")
    return args, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a network. The same command again resumes an interrupted run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:KEY=VALUE,...]",
        help="config file, such as configs/mlp.py, and its arguments (see the file's docstring); "
        "an evaluation takes the run's own by default",
    )
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="value of a config field, such as --config.seed=1"
    )
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run, created if missing")
    parser.add_argument(
        "--mode",
        choices=("train", "eval"),
        default="train",
        help="whether to train or to evaluate a checkpoint (default: train)",
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="checkpoint to evaluate (default: the newest one); 0 is the initial network",
    )
    command.add_allow(parser)
    parser.add_argument(
        "--plan",
        nargs="?",
        const="here",
        metavar="TOPOLOGY",
        help="print memory, FLOPs and time of the run instead of training: measured on these "
        "devices, or estimated by the compiler of absent devices such as v5e:2x4, 2xv5e:4x4 (two "
        "slices), v5p:4x4x4, 8xh100 (default: these devices)",
    )
    parser.add_argument(
        "--plan_json", metavar="FILE", help="file to also write the plan to, as JSON"
    )
    parser.add_argument(
        "--profile_steps",
        type=_steps,
        metavar="FIRST:LAST",
        help="updates to trace into DIR/profile, for TensorBoard and ui.perfetto.dev "
        "(default: none)",
    )
    multi = parser.add_argument_group(
        "runs of several processes",
        "The processes of a TPU slice, a Slurm step or an indexed Kubernetes job find each other "
        "automatically. Elsewhere, start the same command in each process with these flags:",
    )
    multi.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, with a free port"
    )
    multi.add_argument(
        "--process_id", type=int, metavar="I", help="number of this process, 0 to N - 1"
    )
    multi.add_argument(
        "--num_processes", type=int, metavar="N", help="number of processes; 1 runs alone"
    )
    return parser


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not FIRST:LAST; give two update numbers, such as 10:20"
        )
    return int(first), int(last)
