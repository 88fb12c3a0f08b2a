"""What a user did wrong, said in one sentence that tells what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend; the launcher prints its sentence, without a traceback, and exits 2."""


def choose_from(what: str, name: object, valid: Iterable[str]) -> UserError:
    """The error for `name` not being one of `valid`, naming the closest valid one."""
    options = sorted(valid)
    close = difflib.get_close_matches(str(name), options, n=1)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    return UserError(f'unknown {what} "{name}"; choose one of {", ".join(options)}.{hint}')
