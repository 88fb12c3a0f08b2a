"""Options as one object or as arguments: `MLP(..., config=c)` or `MLP(..., norm="dyt")`."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import ParamSpec, TypeVar

from flax import nnx

from rezero_jax.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
KEYWORD, EITHER = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


def takes_options(*positional: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function of a keyword `config` to take the config's fields as keywords too.

    The default of `config` is a dataclass, whose fields have the defaults of the new arguments. An
    argument that a caller gives overrides the field of the `config` that the caller gives. The
    decorated function has a signature with all arguments, and a docstring that describes them. The
    function declares `**options`, and `*args` if options are positional, for type checkers alone.

    Args:
      *positional: fields that may be given by position, after the function's positional arguments.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        own = inspect.signature(function).parameters.values()
        default = inspect.signature(function).parameters["config"].default
        names = [field.name for field in fields(default)]
        options = {
            field.name: inspect.Parameter(
                field.name,
                EITHER if field.name in positional else KEYWORD,
                default=getattr(default, field.name),
                annotation=field.type,
            )
            for field in fields(default)
        }
        signature = inspect.Signature(
            [
                *(parameter for parameter in own if parameter.kind is EITHER),
                *(options.pop(name) for name in positional),
                *(
                    parameter.replace(default=None, annotation=type(default) | None)
                    if parameter.name == "config"
                    else parameter
                    for parameter in own
                    if parameter.kind is KEYWORD
                ),
                *options.values(),
            ]
        )

        @functools.wraps(function)
        def decorated(*args: P.args, **kwargs: P.kwargs) -> T:
            arguments = signature.bind(*args, **kwargs).arguments
            given = {name: arguments.pop(name) for name in names if name in arguments}
            config = arguments.pop("config", None) or default
            if not isinstance(config, type(default)):
                wanted = type(default).__name__
                raise UserError(f"config is a {type(config).__name__}; give a {wanted}")
            return function(**arguments, config=replace(config, **given))  # type: ignore[call-arg]

        decorated.__signature__ = signature  # type: ignore[attr-defined]
        decorated.__doc__ = _documented(function.__doc__, type(default))
        return decorated

    return decorate


def _documented(doc: str | None, config: type) -> str:
    """The docstring, and the attributes that the config's and its bases' docstrings describe."""
    docs = [inspect.cleandoc(kind.__doc__ or "") for kind in reversed(config.__mro__[:-1])]
    sections = [text.partition("Attributes:\n")[2].partition("\n\n")[0] for text in docs]
    options = "\n".join([f"Options, the fields of `{config.__name__}`:", *sections])
    return f"{inspect.cleandoc(doc or '')}\n\n{options}".strip()


class _OwnSignature:
    """The signature of a class is that of its constructor, whatever its metaclass does."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Module(nnx.Module):
    """A module whose `help` and `inspect.signature` show the arguments of its constructor."""

    __signature__ = _OwnSignature()
