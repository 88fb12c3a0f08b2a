"""Errors that say in one sentence what the user should do."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A mistake the user can correct; the launcher prints its sentence alone, and exits so."""

    status = 2


class Unavailable(UserError):
    """A failure that passes: the same command may succeed later, and engines give it again."""

    status = 4


def choose_from(what: str, name: object, valid: Iterable[str]) -> UserError:
    """The error for `name` not being one of `valid`, naming the closest valid one."""
    options = sorted(valid)
    close = difflib.get_close_matches(str(name), options, n=1)
    hint = f'did you mean "{close[0]}"? The valid ones are' if close else "choose one of"
    return UserError(f'unknown {what} "{name}"; {hint} {", ".join(options)}')


def closest_beside(path: Path) -> Path | None:
    """The sibling of a missing file or folder that has the closest name, if one is close."""
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return path.parent / close[0] if close else None


def first_line(error: Exception) -> str:
    """The gist of an error of JAX or Orbax, which may fill pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
