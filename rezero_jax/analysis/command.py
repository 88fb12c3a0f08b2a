"""What the command lines of the analysis and the experiments share."""

import argparse
import signal
import sys
from collections.abc import Callable

from rezero_jax.errors import UserError


def parser(
    module: str, description: str | None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """The parser of `python -m module`, which shows its docstring and epilog as they stand."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def exit_status(name: str, work: Callable[[], None]) -> int:
    """Does the work of the command `name`; returns 0, or 2 after printing a user's mistake."""
    try:
        work()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def workdir(text: str) -> str:
    """The type of an argument that names a run folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty (an unset variable?); name the run's folder")
    return text
