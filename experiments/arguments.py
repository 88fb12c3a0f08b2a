"""Flags that the commands of experiments share, and their checks."""

import argparse
from collections.abc import Sequence

from rezero_jax.errors import UserError

EXIT_STATUS = """\
exit status: 0 all done; 2 a failure, explained in one sentence; 130 or 143 stopped by Ctrl-C or
SIGTERM with all runs saved, and the same command resumes them.
"""


def add_rules(parser: argparse.ArgumentParser, sizes: str, rules: str) -> None:
    """Adds the flags that say which config runs under which residual rules.

    Args:
      sizes: the arguments beside residual= that the config must take.
      rules: the help text of --rules.
    """
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:KEY=VALUE,...]",
        help=f"a file of configs/ that takes residual= and {sizes}, and its other arguments",
    )
    parser.add_argument("--config.KEY", metavar="VALUE", help="sets a field of every config")
    parser.add_argument("--rules", required=True, type=_names, metavar="RULE,...", help=rules)


def add_count(parser: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    """Adds a flag that takes a number above 0."""
    parser.add_argument(
        f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
    )


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the flag for the output folder."""
    parser.add_argument(
        "--out", default=default, metavar="DIR", help=f"output folder (default: {default})"
    )


def _names(text: str) -> list[str]:
    """The names of "a,b,a", each once and in their order."""
    return list(dict.fromkeys(text.split(",")))


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the texts "KEY=VALUE" of every --config.KEY=VALUE."""
    overrides = [text.removeprefix("--config.") for text in argv if text.startswith("--config.")]
    args = parser.parse_args([text for text in argv if not text.startswith("--config.")])
    return args, overrides


def check_positive(args: argparse.Namespace, *flags: str) -> None:
    """Raises UserError if one of the flags is given and below 1."""
    for flag in flags:
        if (value := getattr(args, flag)) is not None and value < 1:
            name = flag.replace("_", "-")
            raise UserError(f"--{name}={value} is not positive; give at least 1")


def check_config(args: argparse.Namespace) -> None:
    """Raises UserError if --config is not of the form configs/FILE."""
    if not args.config.startswith("configs/"):
        raise UserError(f"--config={args.config} is not a file of configs/; give such a file")


def sizes(flag: str, text: str, at_least: int = 1) -> list[int]:
    """The whole numbers of "8,32", ascending; raises UserError for anything else."""
    parts = text.split(",")
    if len(set(parts)) < at_least or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--{flag}={text} needs {at_least} or more whole numbers; give 2,8,32")
    return sorted({int(part) for part in parts})


def with_arguments(config: str, *more: str) -> str:
    """ "configs/FILE:KEY=VALUE,..." with more arguments, as a Job names it."""
    file, _, arguments = config.removeprefix("configs/").partition(":")
    return f"{file}:{','.join(filter(None, (arguments, *more)))}"
