"""What the commands of experiments have in common: flags, and their checks."""

import argparse
from collections.abc import Sequence

from rezero_jax.errors import UserError


def add_rules(parser: argparse.ArgumentParser, sizes: str, rules: str = "") -> None:
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
        raise UserError(f"--config={args.config} is not a file of configs/; name one of those")


def with_arguments(config: str, *more: str) -> str:
    """ "configs/FILE:KEY=VALUE,..." with more arguments, as a Job names it."""
    file, _, arguments = config.removeprefix("configs/").partition(":")
    return f"{file}:{','.join(filter(None, (arguments, *more)))}"
