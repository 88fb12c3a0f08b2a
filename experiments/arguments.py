"""Flags that the commands of experiments share, and the types of their values."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rezero_jax.errors import UserError

EXIT_STATUS = """\
exit status: 0 all done; 2 a failure, explained in one sentence; 130 or 143 stopped by Ctrl-C or
SIGTERM with all runs saved, and the same command resumes them.
"""


def add_rules(parser: argparse.ArgumentParser, sizes: str, rules: str) -> None:
    """Adds --config, which must take residual= and `sizes`, and --rules with its help text."""
    text = f"a file of configs/ that takes residual= and {sizes}, and its other arguments"
    add_config(parser, text)
    parser.add_argument("--rules", required=True, type=_names, metavar="RULE,...", help=rules)


def add_config(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --config with its help text, and --config.KEY=VALUE, see `parse`."""
    shown = "FILE[:KEY=VALUE,...]"
    parser.add_argument("--config", required=True, type=_config, metavar=shown, help=text)
    parser.add_argument("--config.KEY", metavar="VALUE", help="sets a field of every config")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Adds --scale and --seeds, which choose the runs of an experiment."""
    text = (
        "paper: for accelerators; cpu: some hours on two cores; smoke: a test; gpu: resnet and "
        "transformer_deep alone, see the command gpu (default: cpu)"
    )
    parser.add_argument("--scale", default="cpu", help=text)
    text = "runs of each setting, seeds 0 .. N-1 (default: 1; at scale paper the paper's number)"
    add_count(parser, "seeds", text)


def add_count(
    parser: argparse.ArgumentParser, name: str, text: str, default: int | None = None
) -> None:
    """Adds a flag that takes a number above 0."""
    text += f" (default: {default})" if default else ""
    parser.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=text)


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the texts "KEY=VALUE" of every --config.KEY=VALUE."""
    overrides = [text.removeprefix("--config.") for text in argv if text.startswith("--config.")]
    args = parser.parse_args([text for text in argv if not text.startswith("--config.")])
    return args, overrides


def _names(text: str) -> list[str]:
    """The names of "a,b,a", each once and in their order."""
    return list(dict.fromkeys(text.split(",")))


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _config(text: str) -> str:
    """The argument of "configs/FILE:KEY=VALUE,...", without the folder, as a Job names it."""
    if not text.startswith("configs/"):
        raise argparse.ArgumentTypeError(f"{text} is not a file of configs/; give such a file")
    return text.removeprefix("configs/")


def sizes(text: str) -> list[int]:
    """The whole numbers of "8,32", ascending: an argparse type."""
    return sorted(set(map(_count, text.split(","))))


def with_arguments(config: str, *more: str) -> str:
    """ "FILE:KEY=VALUE,..." with more arguments."""
    file, _, arguments = config.partition(":")
    return f"{file}:{','.join(filter(None, (arguments, *more)))}"


def check_size(config: str, model: Mapping[str, Any], axis: str, size: int) -> None:
    """Raises a UserError if the size of `model` is not the one asked for, as in a smoke test."""
    if model[axis] != size:
        raise UserError(
            f"--config={config} sets the {axis} to {model[axis]} regardless of --{axis}s; leave "
            "out the argument that does"
        )
