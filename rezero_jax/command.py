"""Helpers that the command lines share: streams, the parser, and errors as an exit status."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rezero_jax.errors import UserError


def run(main: Callable[..., int | None], *args: Any) -> NoReturn:
    """Runs a program's `main` and exits with its status; 141 if the reader of its output is gone.

    For entry points: it replaces standard streams, see `open_streams`.
    """
    open_streams()
    status: Any
    try:
        try:
            status = main(*args)
        except SystemExit as end:  # after --help
            status = end.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        _discard(sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def open_streams(lasting: bool = False) -> None:
    """Makes the standard streams safe to use; a program calls it first.

    A closed stream is opened, because the next file would otherwise get its number and the messages
    of libraries. A character that the output cannot encode becomes "?". With `lasting`, output is
    discarded once it cannot be written, as when a terminal is lost or the disk of a log is full.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if lasting:
        for name, old in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            file = io.BufferedWriter(_Lasting(old.fileno(), "w", closefd=False))
            new = io.TextIOWrapper(file, old.encoding, "replace", line_buffering=True)
            setattr(sys, name, new)


class _Lasting(io.FileIO):
    """A file whose output is discarded once it cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            _discard(self.fileno())
            return len(data)


def _discard(number: int) -> None:
    """Makes the null device of an open file."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


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
    """The exit status of `work`: 0, that of a printed error, or 130 on Ctrl-C."""
    try:
        work()
        sys.stdout.flush()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.status
    except ModuleNotFoundError as error:
        print(
            f'{name}: {error}; install what training needs: pip install ".[train]"', file=sys.stderr
        )
        return UserError.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except OSError as error:
        file = error.filename or "the output"
        print(f"{name}: cannot use {file} ({error.strerror or error})", file=sys.stderr)
        return UserError.status
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
