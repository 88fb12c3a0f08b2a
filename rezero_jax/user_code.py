"""A user's own residual rule, model or objective, which a config names as "module:name".

The config of a run folder or of an exported model may be a stranger's. Whatever reads such a config
calls `check_allowed`, so that only modules which the user allows are ever imported.
"""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from rezero_jax.errors import UserError

FIELDS = ("model.residual", "model.name", "train.objective")


def is_own(name: object) -> bool:
    """Whether a config's value names code outside this package."""
    return isinstance(name, str) and ":" in name


def own_names(config: Any) -> dict[str, str]:
    """The names of the user's code in a config, by field; a section without fields has none."""
    found: dict[str, str] = {}
    for key in FIELDS:
        section, _, field = key.partition(".")
        fields = config.get(section)
        if hasattr(fields, "get") and is_own(name := fields.get(field)):
            found[key] = name
    return found


def check_allowed(config: Any, allow: Sequence[str], source: object) -> None:
    """Raises a UserError for a module that a config names and `allow` lacks; imports nothing.

    `allow` has names of modules, of which a package allows its submodules; `source` is where the
    config is from. The config may be a dict.
    """
    if isinstance(allow, str):
        raise UserError(f"allow={allow!r} is a str; give a tuple of names, such as ({allow!r},)")
    for key, name in own_names(config).items():
        module = name.partition(":")[0]
        if not any(f"{module}.".startswith(f"{allowed}.") for allowed in allow):
            raise UserError(
                f"{source} has {key}={name!r}, so that the module {module!r} would be imported and "
                f"run; if you trust it, allow it by --allow={module}, in Python by "
                f"allow=({module!r},)"
            )


def find(key: str, name: str) -> Any:
    """Imports what the config field `key` names; errors in the user's module pass unchanged.

    Raises a UserError unless `name` has the form module:name and the module exists and has it.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UserError(f"{key}={name!r} is not of the form module:name, such as mine:MyRule")
    try:
        module: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The user's module imports another one.
        module = None
    # Any folder is a module, but has no file.
    file = getattr(module, "__file__", None)
    if module is None or (file is None and module_name != "__main__"):
        raise UserError(
            f"{key}={name!r}: Python finds no module {module_name}; run the command in the folder "
            "of the module, or add that folder to PYTHONPATH"
        )
    if not hasattr(module, attribute):
        raise UserError(
            f"{key}={name!r}: {file or module_name} has no {attribute}; define it, or correct {key}"
        )
    return getattr(module, attribute)


def check_call(what: str, function: Any, *args: str, **kwargs: Any) -> None:
    """Raises a UserError unless a function or class, `what` in errors, can be called like this.

    The function is not called: `args` are the names of the positional arguments.
    """
    if not callable(function):
        raise UserError(f"{what} is a {type(function).__name__}; name a function or a class")
    is_class = isinstance(function, type)  # Flax's metaclass hides the signature of a class.
    called = function.__init__ if is_class else function
    try:
        signature = inspect.signature(called)
        signature.bind(*(["self"] if is_class else []), *args, **kwargs)
    except ValueError:  # a builtin has no signature
        return
    except TypeError as error:
        call = ", ".join([*args, *(f"{name}=..." for name in kwargs)])
        raise UserError(
            f"{what}{signature} cannot be called as ({call}): {error}; change its signature"
        ) from None
