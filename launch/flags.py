"""The flags of train.py."""

import argparse

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
  what a run will need, without training; on a TPU, by its compiler, which runs anywhere:
    python train.py --config=configs/transformer_enwik8.py:layers=64 --plan
    python train.py --config=configs/transformer_enwik8.py:layers=64 --plan=v5e:2x4

exit status: 0 finished; 2 a mistake in the command, the config or the workdir; 3 the loss or the
gradient stopped being finite; 4 another process of the run was lost or did not come, or the bucket
does not answer; 130 or 143 stopped by Ctrl-C or SIGTERM, and if training had begun, the state is
saved. After 4, 130 and 143 the same command resumes.
"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads a command line; returns its flags and the texts "KEY=VALUE" of its --config.KEY=VALUE.

    Raises:
      SystemExit: a flag is wrong or missing (status 2, with a sentence on stderr), or --help.
    """
    parser = _parser()
    overrides = [text.removeprefix("--config.") for text in argv if text.startswith("--config.")]
    args = parser.parse_args([text for text in argv if not text.startswith("--config.")])
    if args.workdir is None and args.plan is None:
        parser.error("--workdir is missing: name the run's folder, such as --workdir=runs/first")
    if args.plan_json and args.plan is None:
        parser.error("--plan_json needs --plan, such as --plan=v5e:2x4")
    if args.workdir == "":
        parser.error("--workdir= is empty (an unset variable?); name the run's folder")
    return args, overrides


def _parser() -> argparse.ArgumentParser:
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
        metavar="TOPOLOGY",
        help="print memory, FLOPs and time of the run instead of training: as measured here, or as "
        "compiled for v5e:2x4, 2xv5e:4x4 (two slices), v5p:4x4x4, 8xh100, ..., without having them",
    )
    parser.add_argument("--plan_json", metavar="FILE", help="write the plan there as JSON, too")
    parser.add_argument(
        "--profile_steps",
        metavar="FIRST:LAST",
        help="write a trace of these updates to DIR/profile, for TensorBoard and ui.perfetto.dev",
    )
    multi = parser.add_argument_group(
        "a run of several processes",
        "On TPU slices, in Slurm and in indexed Kubernetes jobs the processes find each other "
        "automatically. Elsewhere, start the same command in each with these flags:",
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
    return parser
