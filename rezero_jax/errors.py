"""What a user did wrong, said in one sentence that tells what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend; the launcher prints its sentence alone and exits 2."""


def choose_from(what: str, name: object, valid: Iterable[str]) -> UserError:
    """The error for `name` not being one of `valid`, naming the closest valid one."""
    options = sorted(valid)
    close = difflib.get_close_matches(str(name), options, n=1)
    hint = f'did you mean "{close[0]}"? The valid ones are' if close else "choose one of"
    return UserError(f'unknown {what} "{name}"; {hint} {", ".join(options)}')


def first_line(error: Exception) -> str:
    """The gist of an error of JAX or Orbax, which may go on for pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
