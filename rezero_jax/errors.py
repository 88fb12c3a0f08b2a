"""Errors that state in one sentence what is wrong and what the user should do."""

import contextlib
import difflib
import operator
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import SupportsIndex


class UserError(ValueError):
    """A mistake that the user can correct; train.py prints its sentence and exits with `status`.

    The sentence may name files and folders of strangers.
    """

    status = 2

    def __init__(self, message: str):
        super().__init__(printable(message))


class Unavailable(UserError):
    """A failure that passes: the same command may succeed later, and launchers start it again."""

    status = 4


class Diverged(Exception):
    """A loss, gradient, parameter or evaluation is not finite; the sentence names the step."""


def choose_from(what: str, name: object, valid: Iterable[str]) -> UserError:
    """The error for a `name` that is not in `valid`; it suggests the closest valid name."""
    options = sorted(valid)
    close = difflib.get_close_matches(str(name), options, n=1)
    hint = f'did you mean "{close[0]}"? The valid ones are' if close else "choose one of"
    return UserError(f'unknown {what} "{name!s:.80}"; {hint} {", ".join(options)}')


def printable(text: object) -> str:
    """The text with control characters escaped, such as \\x1b, which could rewrite a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def check_choice(what: str, name: object, valid: Collection[str]) -> None:
    """Raises the error of `choose_from` for a `name` that is not in `valid`."""
    if name not in valid:
        raise choose_from(what, name, valid)


def check_between(low: float, value: float | None, high: float, name: str) -> None:
    """Raises a UserError for a number `name` that is not in low .. high; None is unset."""
    if value is not None and not low <= value <= high:
        raise UserError(f"{name}={value} is out of range; give {low} .. {high}")


def check_sizes(**sizes: SupportsIndex | None) -> None:
    """Raises a UserError for a size that is not a whole number above 0; None is unset."""
    for name, size in sizes.items():
        try:
            valid = size is None or operator.index(size) >= 1
        except TypeError:
            valid = False
        if not valid:
            raise UserError(f"{name} is {size}; give a whole number of at least 1")


def check_images(shape: tuple[int, ...], channels: int, size: int | None = None) -> None:
    """Raises a UserError unless images are (batch, size, size, channels); None is any size."""
    sides = shape[1:3] if size is None else (size, size)
    if len(shape) == 4 and shape[1:] == (*sides, channels):
        return
    wanted = f"(batch, {size or 'height'}, {size or 'width'}, {channels})"
    is_turned = len(shape) == 4 and shape[1] == channels
    cure = "call x.transpose(0, 2, 3, 1)" if is_turned else "convert them, or make another model"
    raise UserError(f"this model takes images {wanted}, not {shape}; {cure}")


def hint_beside(path: Path, otherwise: str) -> str:
    """A hint on a missing file or folder: its sibling with the closest name, or `otherwise`."""
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else otherwise


def first_line(error: Exception) -> str:
    """The first line of an error's text, which may fill pages in JAX and Orbax."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def foreign(path: str | os.PathLike[str], own: Collection[str] = ()) -> Iterator[None]:
    """Raises whatever the use of a JSON file raises, which may hold anything, as a UserError.

    Errors pass as they are if the file names the user's `own` code, which may have raised them.
    """
    try:
        yield
    except Exception as error:
        if own or isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is broken or of another version of rezero_jax ({type(error).__name__}: "
            f"{first_line(error)}); restore it from a copy, or write it again"
        ) from error
