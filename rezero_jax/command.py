"""Helpers that the command lines share: the parser, and errors as an exit status."""

import argparse
import signal
import sys
from collections.abc import Callable

from rezero_jax.errors import UserError


def parser(
    program: str, description: str | None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """The parser of a program, whose help shows description and epilog without reformatting."""
    return argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def exit_status(name: str, work: Callable[[], None]) -> int:
    """The exit status of `work`: 0, that of the `UserError`, which is printed, or 130 on Ctrl-C."""
    try:
        work()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Adds --allow, the list of modules that the config of a run may import."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="MODULE",
        help="module of your own rule, model or objective that the run's config may import and "
        "run; may be repeated (default: none)",
    )


def path(text: str) -> str:
    """The argparse type of a file or folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty (an unset variable?); name a file or folder")
    return text
