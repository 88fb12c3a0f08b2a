"""What the command lines of this package have in common."""

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
    """Does the work of the command `name`: 0 done; 2 a user's mistake, said in one sentence."""
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
