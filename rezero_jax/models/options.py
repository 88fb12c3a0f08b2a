"""Options as one object or as arguments: `MLP(..., config=c)` or `MLP(..., norm="dyt")`."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from rezero_jax.errors import UserError
from rezero_jax.residual import RULES, Rule

P = ParamSpec("P")
T = TypeVar("T")
KEYWORD, EITHER = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


def takes_options(*positional: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function of a keyword `config` to take the config's fields as keywords too.

    The default of `config` is a dataclass with the defaults of the new arguments, which override
    the fields of a given `config`. The signature and the docstring then have all arguments. The
    function gets Python's numbers for scalars of NumPy and JAX. It declares `**options`, and
    `*args` if options are positional, for type checkers. A module that the function makes keeps its
    arguments in `made_by`, for `rezero_jax.save`.

    Args:
      *positional: fields that may be given by position, after the function's positional arguments.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        own = dict(inspect.signature(function).parameters)
        default = own["config"].default
        defaults = {name: p.default for name, p in own.items() if p.default is not p.empty}
        own["config"] = own["config"].replace(default=None, annotation=type(default) | None)
        options = {
            field.name: inspect.Parameter(
                field.name,
                EITHER if field.name in positional else KEYWORD,
                default=getattr(default, field.name),
                annotation=field.type,
            )
            for field in fields(default)
        }
        parameters = [p for p in (own | options).values() if p.kind in (EITHER, KEYWORD)]
        signature = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))

        @functools.wraps(function)
        def decorated(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(*args, **kwargs).arguments
            arguments = {name: _number(value) for name, value in bound.items()}
            if arguments.get("dtype") is not None:  # np.float32 and "float32" are jnp.float32
                arguments["dtype"] = getattr(jnp, jnp.dtype(arguments["dtype"]).name)
            given = {name: arguments.pop(name) for name in options if name in arguments}
            config = arguments.pop("config", None) or default
            if not isinstance(config, type(default)):
                wanted = type(default).__name__
                raise UserError(f"config is a {type(config).__name__}; give a {wanted}")
            config = replace(config, **given)
            made = function(**arguments, config=config)  # type: ignore[call-arg]
            module = arguments.get("self") if function.__name__ == "__init__" else made
            if isinstance(module, nnx.Module):
                name = type(module).__name__
                name += "" if module is not made else f".{function.__name__}"
                call = _call_text(name, defaults | arguments | vars(config))
                module.made_by = call  # type: ignore[attr-defined]
            return made

        decorated.__signature__ = signature  # type: ignore[attr-defined]
        decorated.__doc__ = _documented(function.__doc__, type(default))
        return decorated

    return decorate


def _call_text(name: str, arguments: Mapping[str, Any]) -> str | None:
    """The name and the arguments of a constructor as JSON; None if an argument is an object."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray | Array):
            return value.item()
        if isinstance(value, type) and issubclass(value, Rule):
            own = f"{value.__module__}:{value.__qualname__}"
            return next((name for name, rule in RULES.items() if rule is value), own)
        if value is arguments.get("dtype"):
            return jnp.dtype(value).name
        raise TypeError

    others = ("self", "cls", "config", "rngs")
    call = {"name": name} | {k: v for k, v in arguments.items() if k not in others}
    try:
        return json.dumps(call, default=plain, allow_nan=False)
    except (TypeError, ValueError):
        return None


def _number(value: Any) -> Any:
    """A scalar of NumPy or JAX as a number of Python, which shapes and static fields need."""
    is_scalar = isinstance(value, np.generic | jax.Array) and value.ndim == 0
    return value.item() if is_scalar and not isinstance(value, jax.core.Tracer) else value


def _documented(doc: str | None, config: type) -> str:
    """The docstring, and the attributes that the config's and its bases' docstrings describe."""
    docs = [inspect.cleandoc(kind.__doc__ or "") for kind in reversed(config.__mro__[:-1])]
    sections = [text.partition("Attributes:\n")[2].partition("\n\n")[0] for text in docs]
    options = "\n".join(
        [f"Options, also as the fields of `config`, a `{config.__name__}`:", *sections]
    )
    return f"{inspect.cleandoc(doc or '')}\n\n{options}".strip()


class Module(nnx.Module):
    """A module whose `help` and `inspect.signature` show the arguments of its constructor."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        signature = inspect.signature(cls.__init__)
        own = list(signature.parameters.values())[1:]
        cls.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
